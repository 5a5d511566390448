"""The backbone: padding, configs, weights, errors, memory-free planning."""

import keras
import keras_hub
import numpy as np
import pytest

from keras_gemma2 import Gemma2Backbone, Gemma2Config


def states(backbone, token_ids, padding_mask=None):
    mask = np.ones_like(token_ids) if padding_mask is None else padding_mask
    return keras.ops.convert_to_numpy(backbone({"token_ids": token_ids, "padding_mask": mask}))


@pytest.fixture
def backbone(tiny):
    return Gemma2Backbone(**tiny)


@pytest.mark.parametrize("mask_dtype", ["int32", "bool", "int64"])
def test_any_padding_gives_the_unpadded_states(backbone, mask_dtype):
    rng = np.random.default_rng(0)
    row = rng.integers(0, 97, (1, 13))  # longer than the window of 5
    alone = states(backbone, row)[0]
    layouts = {
        "right": [1] * 13 + [0] * 6,
        "left": [0] * 6 + [1] * 13,
        "both": [0] * 2 + [1] * 13 + [0] * 4,
        "holes": [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1],
    }
    for name, layout in layouts.items():
        mask = np.array([layout], mask_dtype)
        token_ids = rng.integers(0, 97, (1, 19))  # anything may stand in the padding
        token_ids[mask.astype(bool)] = row[0]
        padded = states(backbone, token_ids, mask)[0][mask[0].astype(bool)]
        # The same sums over more terms, some of them zero: a few roundings of values near 1.
        np.testing.assert_allclose(padded, alone, atol=1e-5, err_msg=name)


def test_a_row_of_padding_is_finite_and_leaves_the_others_alone(backbone):
    token_ids = np.random.default_rng(0).integers(0, 97, (2, 9))
    mask = np.array([[1] * 9, [0] * 9])
    out = states(backbone, token_ids, mask)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0], states(backbone, token_ids[:1])[0], atol=1e-5)


def test_weights_are_those_of_the_config(backbone, tiny):
    shapes = {path: tuple(v.shape) for path, v in backbone.named_weights().items()}
    assert shapes == Gemma2Config(**tiny).weight_shapes()
    assert {id(v) for v in backbone.named_weights().values()} == {id(v) for v in backbone.weights}
    assert {v.path for v in backbone.weights} == set(shapes)
    assert backbone.count_params() == Gemma2Config(**tiny).parameter_count()


def test_config_round_trip(tiny):
    backbone = Gemma2Backbone(**tiny, layer_types=["global"] * 4, dropout=0.1, dtype="mixed_bfloat16", name="mine")
    again = Gemma2Backbone.from_config(backbone.get_config())
    assert again.config == backbone.config and again.name == "mine" and again.compute_dtype == "bfloat16"
    assert (
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(backbone)).config == backbone.config
    )
    assert isinstance(backbone, keras_hub.models.Backbone)


def test_soft_caps_of_none(tiny):
    tiny.update(attention_logit_soft_cap=None, final_logit_soft_cap=None)
    backbone = Gemma2Backbone(**tiny)
    assert np.isfinite(states(backbone, np.zeros((1, 3), int))).all()
    assert np.abs(keras.ops.convert_to_numpy(backbone.token_embedding(np.full((1, 42), 50.0), reverse=True))).max() > 50


def test_arguments_are_attributes(backbone, tiny):
    assert {name: getattr(backbone, name) for name in tiny} == tiny
    assert backbone.layer_types == ("local", "global") * 2


def test_symbolic_shapes(backbone):
    assert backbone.output.shape == (None, None, 42)
    assert set(backbone.input) == {"token_ids", "padding_mask"}


@pytest.mark.parametrize("bad, shown", [(97, "97"), (-1, "-1"), (2**31 - 1, "2147483647")])
def test_ids_outside_the_vocabulary_raise(backbone, bad, shown):
    with pytest.raises(ValueError, match=rf"`token_ids` must be in \[0, 97\).*the id {shown}"):
        states(backbone, np.array([[1, bad, 3]]))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"token_ids": np.zeros((1, 3), int)}, "'token_ids' and 'padding_mask'.*'token_ids'"),
        (np.zeros((1, 3), int), "'token_ids' and 'padding_mask'"),
        (
            {"token_ids": np.zeros((1, 3), int), "padding_mask": np.ones((1, 4), int)},
            r"\(1, 3\), padding_mask \(1, 4\)",
        ),
        (
            {"token_ids": np.ones((1, 3)) * 2.5, "padding_mask": np.ones((1, 3), int)},
            "`token_ids` must hold integers.*float64",
        ),
        ({"token_ids": np.zeros(3, int), "padding_mask": np.ones(3, int)}, r"\[batch, length\].*\(3,\)"),
    ],
)
def test_wrong_inputs_raise(backbone, inputs, message):
    with pytest.raises(ValueError, match=message):
        backbone(inputs)


def test_bad_arguments_raise(tiny):
    with pytest.raises(ValueError, match="head_dim=15"):
        Gemma2Backbone(**{**tiny, "head_dim": 15})


def test_dropout_reaches_the_blocks_in_training(tiny):
    backbone = Gemma2Backbone(**{**tiny, "dropout": 0.3})
    inputs = {"token_ids": np.arange(8)[None], "padding_mask": np.ones((1, 8), int)}
    a, b = (keras.ops.convert_to_numpy(backbone(inputs, training=True)) for _ in range(2))
    assert np.abs(a - b).max() > 0.1
    np.testing.assert_array_equal(states(backbone, inputs["token_ids"]), states(backbone, inputs["token_ids"]))
