"""Logits against transformers' `Gemma2ForCausalLM`, float32, one row a feature."""

import warnings

import keras
import numpy as np
import pytest
from oracle import hugging_face_folder, hugging_face_logits, numpy_logits

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

# The promise: at most 2e-5 of the logits' range. float32 rounding over 4 layers measures about 1e-6 of it; every
# mutation in tests/mutations.py moves logits by more than 1e-3 of it.
TOLERANCE = 2e-5
ACTS = 1e-3

# Row -> what transformers is configured with, and a change of our config that breaks just this feature.
ROWS = {
    "everything": ({}, {"sliding_window_size": 6}),
    "attention cap": ({"attn_logit_softcapping": 2.0}, {"attention_logit_soft_cap": 3.0}),
    "no attention cap": ({"attn_logit_softcapping": None}, {"attention_logit_soft_cap": 50.0}),
    "final cap": ({"final_logit_softcapping": 1.0}, {"final_logit_soft_cap": 1.1}),
    "no final cap": ({"final_logit_softcapping": None}, {"final_logit_soft_cap": 3.0}),
    "caps of Gemma 2, not swapped": (
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "enlarge": 20.0},
        {"attention_logit_soft_cap": 30.0, "final_logit_soft_cap": 50.0},
    ),
    "window shorter than the text": ({"sliding_window": 3}, {"sliding_window_size": 4}),
    "window of one": ({"sliding_window": 1}, {"sliding_window_size": 2}),
    "window longer than the text": ({"sliding_window": 40}, {"sliding_window_size": 20}),
    "scalar of 27B's kind": ({"query_pre_attn_scalar": 7}, {"query_pre_attn_scalar": 16}),
    "scalar equal to head_dim": ({"query_pre_attn_scalar": 16}, {"query_pre_attn_scalar": 17}),
    "K = 1": ({"num_key_value_heads": 1}, {"sliding_window_size": 6}),
    "K = 3": ({"num_key_value_heads": 3}, {"sliding_window_size": 6}),
    "K = N": ({"num_key_value_heads": 6}, {"sliding_window_size": 6}),
    "epsilon": ({"rms_norm_eps": 0.1}, {"layer_norm_epsilon": 1e-3}),
    "RoPE base": ({"rope_theta": 20.0}, {"rope_max_wavelength": 500.0}),
    "layer types inverted": (
        {"layer_types": ("full_attention", "sliding_attention", "full_attention", "sliding_attention")},
        {"layer_types": ["local", "global", "local", "global"]},
    ),
    "odd number of layers": ({"num_hidden_layers": 3}, {"layer_types": ["global", "local", "global"]}),
}


def load(folder, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these folders have no tokenizer, and say so
        return Gemma2CausalLM.from_preset(folder, **kwargs)


def our_logits(lm, token_ids):
    return keras.ops.convert_to_numpy(lm({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))


@pytest.fixture
def token_ids():
    return np.random.default_rng(3).integers(0, 97, (2, 23))


@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_transformers(name, token_ids):
    overrides, broken = ROWS[name]
    folder, model = hugging_face_folder(**overrides)
    expected = hugging_face_logits(model, token_ids)
    scale = np.ptp(expected)

    difference = np.abs(our_logits(load(folder), token_ids) - expected).max()
    assert difference <= TOLERANCE * scale, f"{difference / scale:.2e} of the range"

    difference = np.abs(our_logits(load(folder, **broken), token_ids) - expected).max()
    assert difference > ACTS * scale, "the row does not notice its feature breaking"


@pytest.mark.parametrize("name", ["everything", "scalar of 27B's kind", "K = 3"])
def test_logits_equal_float64(name, token_ids):
    folder, _ = hugging_face_folder(**ROWS[name][0])
    lm = load(folder)
    weights = {path: keras.ops.convert_to_numpy(v) for path, v in lm.backbone.named_weights().items()}
    for row, ours in zip(token_ids, our_logits(lm, token_ids)):
        expected = numpy_logits(weights, lm.backbone.config, row)
        assert np.abs(ours - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize("name", ["everything", "K = 1"])
def test_hidden_states_equal_transformers(name, token_ids):
    import torch

    folder, model = hugging_face_folder(**ROWS[name][0])
    with torch.no_grad():
        expected = model.model(torch.tensor(token_ids)).last_hidden_state.numpy()
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    ours = keras.ops.convert_to_numpy(load(folder).backbone(inputs))
    assert np.abs(ours - expected).max() <= TOLERANCE * np.ptp(expected)


# Bounds at the worst element, as a share of the logits' range: twice what was measured on the worst backend (2.4% in
# bfloat16, 0.33% in float16; their roundings of 2^-8 and 2^-11 a step, grown by 4 layers of large weights).
@pytest.mark.parametrize(
    "dtype, bound", [("bfloat16", 0.05), ("mixed_bfloat16", 0.05), ("float16", 0.008), ("mixed_float16", 0.008)]
)
@pytest.mark.filterwarnings("ignore:Gemma 2's activations")
def test_half_precision_is_finite_and_near(dtype, bound, token_ids):
    folder, model = hugging_face_folder()
    expected = hugging_face_logits(model, token_ids)
    lm = load(folder, dtype=dtype)
    ours = our_logits(lm, token_ids)
    assert ours.dtype == "float32" and np.isfinite(ours).all()
    assert np.abs(ours - expected).max() <= bound * np.ptp(expected)
    variable_dtype = "float32" if dtype.startswith("mixed") else dtype
    assert {v.dtype for v in lm.backbone.variables} == {variable_dtype}


@pytest.mark.filterwarnings("ignore:Gemma 2's activations")
@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_float16_stays_finite_when_activations_overflow(dtype, token_ids):
    """At a residual stream over 65504, as in the 27B, float16 is finite, and still ranks tokens like float32."""
    folder, _ = hugging_face_folder()
    exact, half = load(folder), load(folder, dtype=dtype)
    for lm in (exact, half):
        for block in lm.backbone.transformer_layers:
            block.post_ffw_norm.scale.assign(block.post_ffw_norm.scale + 6e4)  # each branch adds tens of thousands
            up = block.feed_forward.up.kernel
            up.assign(keras.ops.cast(up, "float32") * 2e3)  # the gated product passes 65504
    reference, ours = our_logits(exact, token_ids), our_logits(half, token_ids)
    assert np.isfinite(ours).all()
    assert (ours.argmax(-1) == reference.argmax(-1)).mean() > 0.8


def test_float16_warns():
    folder, _ = hugging_face_folder()
    with pytest.warns(UserWarning, match="65504"):
        Gemma2Backbone.from_preset(folder, dtype="float16")
