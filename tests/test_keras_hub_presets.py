"""keras-hub's own Gemma 2 presets, in and out: the oracle is keras-hub, and where it is wrong, float64 numpy."""

import gc
import json
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from oracle import numpy_logits
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints import keras_hub as ours
from keras_gemma2.checkpoints.reading import find_source, open_weights
from keras_gemma2.checkpoints.writing import outgoing_from_backbone
from keras_gemma2.errors import CheckpointError

# As in test_parity: two float32 implementations differ by the rounding of sums in another order.
TOLERANCE = 2e-5
IDS = np.random.default_rng(1).integers(0, 600, (2, 13))  # longer than the window
# No accidental identities: N * H != D, 1 < K < N, H != D / N. The epsilon is the one keras-hub's blocks always have.
THEIRS = {
    "vocabulary_size": 600,
    "num_layers": 3,
    "num_query_heads": 6,
    "num_key_value_heads": 2,
    "hidden_dim": 42,
    "intermediate_dim": 160,
    "head_dim": 16,
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 5,
    "layer_norm_epsilon": 1e-6,
}
OURS = {
    "vocabulary_size": 600,
    "num_layers": 3,
    "num_query_heads": 6,
    "num_key_value_heads": 2,
    "hidden_dim": 42,
    "intermediate_dim": 80,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window_size": 5,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
}
SHARD = 120_000 / 2**30  # GB; the embedding has 100,800 bytes in float32


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")
        warnings.filterwarnings("ignore", message="Gemma 2's activations")  # of float16
        warnings.filterwarnings("ignore", message=".*quantize.*")  # Keras on layers without weights
        yield


def enlarge(model):
    """Weights so large that caps and windows act, norms that are not all alike."""
    values = np.random.default_rng(3)
    for variable in model.variables:
        size = 0.3 if "scale" in variable.path else 0.25 if "embedding" in variable.path else 0.6
        variable.assign(values.normal(size=variable.shape) * size)
    return model


def their_backbone(dtype="float32", **changes):
    return enlarge(keras_hub.models.GemmaBackbone(**{**THEIRS, **changes}, dtype=dtype))


def their_task(dtype="float32", **changes):
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
        keras_hub.tokenizers.GemmaTokenizer(train_vocabulary()), sequence_length=33
    )
    return keras_hub.models.GemmaCausalLM(their_backbone(dtype, **changes), preprocessor)


def our_backbone(dtype="float32", **changes):
    return enlarge(Gemma2Backbone(**{**OURS, **changes}, dtype=dtype))


def logits(task):
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    return keras.ops.convert_to_numpy(keras.ops.cast(task(inputs), "float32"))


def oracle_logits(backbone):
    weights = {path: keras.ops.convert_to_numpy(v.value) for path, v in backbone.named_weights().items()}
    return np.stack([numpy_logits(weights, backbone.config, row) for row in IDS])


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert np.abs(actual - expected).max() <= tolerance * np.ptp(expected)


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["config"].update(changes)
    for key in remove:
        values["config"].pop(key, None)
    path.write_text(json.dumps(values))


# In ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [10, SHARD])
@pytest.mark.parametrize("windows", [True, False])
def test_presets_of_keras_hub_load_with_equal_logits(tmp_path, shard, windows):
    theirs = their_task(use_sliding_window_attention=windows)
    theirs.save_to_preset(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.h5"))) == 1 if shard == 10 else 3
    lm = Gemma2CausalLM.from_preset(tmp_path)
    expected = ["local", "global", "local"] if windows else ["global"] * 3
    assert list(lm.backbone.config.layer_types) == expected and lm.backbone.config.intermediate_dim == 80
    assert_close(logits(lm), logits(theirs))
    assert_close(logits(lm), oracle_logits(lm.backbone))
    assert lm.preprocessor.tokenizer.tokenize("Some text") == pytest.approx(theirs.preprocessor.tokenizer("Some text"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_read_bit_by_bit(tmp_path, dtype):
    theirs = their_backbone(dtype)
    theirs.save_to_preset(tmp_path)
    backbone = Gemma2Backbone.from_preset(tmp_path)
    assert backbone.dtype_policy.name == dtype
    their_block, block = theirs.transformer_layers[1], backbone.transformer_layers[1]

    def matrix(variable, *axes):
        array = keras.ops.convert_to_numpy(variable.value).transpose(axes)
        return array.reshape(-1, array.shape[-1])

    attention = their_block.attention
    pairs = [
        (block.attention.query.kernel, matrix(attention.query_dense.kernel, 0, 2, 1)),
        (block.attention.key.kernel, matrix(attention.key_dense.kernel, 0, 2, 1)),
        (block.attention.value.kernel, matrix(attention.value_dense.kernel, 0, 2, 1)),
        (block.feed_forward.gate.kernel, matrix(their_block.gating_ffw.kernel, 1, 0)),
        (block.feed_forward.up.kernel, matrix(their_block.gating_ffw_2.kernel, 1, 0)),
        (block.feed_forward.down.kernel, matrix(their_block.ffw_linear.kernel, 1, 0)),
        (backbone.token_embedding.embeddings, matrix(theirs.token_embedding.embeddings, 0, 1)),
    ]
    for ours_, expected in pairs:
        assert keras.ops.convert_to_numpy(ours_.value).tobytes() == expected.tobytes()


def test_query_scale_of_27b(tmp_path):
    """keras-hub 0.32 ignores its own flag; the right logits are numpy's, and differ from its own."""
    theirs = their_task(query_head_dim_normalize=False)
    theirs.save_to_preset(tmp_path)
    lm = Gemma2CausalLM.from_preset(tmp_path)
    assert lm.backbone.config.query_pre_attn_scalar == 7  # 42 / 6
    assert_close(logits(lm), oracle_logits(lm.backbone))
    assert np.abs(logits(lm) - logits(theirs)).max() > 0.1


def test_other_ways_to_write_the_config(tmp_path):
    """Keys that older versions leave out, a dtype as a text, keras-nlp's names, no registered name."""
    their_backbone("bfloat16").save_to_preset(tmp_path)
    edit_config(tmp_path, ["query_head_dim_normalize", "dropout", "layer_norm_epsilon"], dtype="bfloat16")
    values = json.loads((tmp_path / "config.json").read_text())
    for names in (
        {"registered_name": "keras_nlp>GemmaBackbone", "module": "keras_nlp.src.models.gemma.gemma_backbone"},
        {"registered_name": None},
        {"module": None},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **names}))
        source = find_source("x", str(tmp_path))
        assert source.kind == "keras_hub" and source.dtype == "bfloat16" and source.config.query_pre_attn_scalar == 16
        assert Gemma2Backbone.from_preset(tmp_path, dtype="float32").dtype_policy.name == "float32"


def test_all_four_classes_and_no_weights(tmp_path):
    their_task("bfloat16").save_to_preset(tmp_path)
    tokenizer = Gemma2Tokenizer.from_preset(tmp_path)
    assert tokenizer.stop_token_ids == (1, 107)
    preprocessor = Gemma2CausalLMPreprocessor.from_preset(tmp_path)
    assert preprocessor.tokenizer.proto == tokenizer.proto == train_vocabulary()
    (tmp_path / "model.weights.h5").unlink()
    assert Gemma2CausalLM.from_preset(tmp_path, load_weights=False).backbone.dtype_policy.name == "bfloat16"
    with pytest.raises(CheckpointError, match=r"No model\.weights\.h5"):
        Gemma2CausalLM.from_preset(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_post_ffw_norm": False, "use_post_attention_norm": False}, "is a Gemma 1"),
        ({"use_post_ffw_norm": False}, "no Gemma 2"),
        ({"intermediate_dim": 161}, "intermediate_dim.*161"),
        ({"num_layers": 10**12}, "num_layers"),
        ({"head_dim": None}, "head_dim"),
        ({"query_head_dim_normalize": "no"}, "query_head_dim_normalize.*'no'"),
        ({"dtype": "float8_from_bfloat16"}, "quantized to float8"),
        ({"hidden_dim": 44}, r"shape .*\(600, 42\).*\(600, 44\)"),
        ({"num_layers": 4}, "Missing: .*gemma_decoder_block_3"),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    their_backbone().save_to_preset(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(tmp_path)


def test_other_models_are_refused_by_name(tmp_path):
    config = {"module": "keras_hub.src.models.gemma3.gemma3_backbone", "class_name": "Gemma3Backbone", "config": {}}
    for registered in ("keras_hub>Gemma3Backbone", None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "registered_name": registered}))
        with pytest.raises(CheckpointError, match="a keras-hub preset of Gemma3Backbone"):
            Gemma2Backbone.from_preset(tmp_path)
    keras_hub.models.GemmaBackbone(97, 2, 6, 2, 42, 160, 16).save_to_preset(tmp_path)
    with pytest.raises(CheckpointError, match="is a Gemma 1.*keras_hub.models.GemmaCausalLM"):
        Gemma2CausalLM.from_preset(tmp_path)


# Quantized --------------------------------------------------------------------------------------------------------------

KERNELS = {
    "attention/query/kernel": (lambda block: block.attention.query_dense, (0, 2, 1)),
    "attention/output_projection/kernel": (lambda block: block.attention.output_dense, (2, 0, 1)),
    "feed_forward/gate/kernel": (lambda block: block.gating_ffw, (1, 0)),
    "feed_forward/down/kernel": (lambda block: block.ffw_linear, (1, 0)),
}


def quantize(model, mode):
    config = None
    if " " in mode:
        config = keras.quantizers.Int4QuantizationConfig(block_size=None if mode == "int4 by channel" else 8)
    gc.freeze()  # Keras collects garbage for every layer, which takes seconds where many modules are loaded
    try:
        model.quantize(None if config else mode, config=config)
    finally:
        gc.unfreeze()
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["int8", "int4", "int4 by channel", "int4 in blocks of 8"])
def test_quantized_presets(tmp_path, mode, dtype):
    """Each weight is what Keras's own layer computes with; its products with unit vectors show it."""
    theirs = quantize(their_backbone(dtype), mode)
    theirs.save_to_preset(tmp_path)
    backbone = Gemma2Backbone.from_preset(tmp_path)
    assert backbone.dtype_policy.name == dtype
    ours_ = {path: v.astype("float32") for path, v in numpy_weights(backbone)}
    # int8 layers of Keras quantize their inputs too; a unit vector passes that but for the scale's rounding.
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    embedding = keras.ops.convert_to_numpy(keras.ops.cast(theirs.token_embedding(np.arange(600)), "float32"))
    assert_close(ours_["token_embedding/embeddings"], embedding, tolerance)
    for path, (layer, axes) in KERNELS.items():
        kernel = product_with_units(layer(theirs.transformer_layers[1])).transpose(axes)
        expected = kernel.reshape(-1, 42) if path != "attention/output_projection/kernel" else kernel.reshape(42, -1)
        expected = expected.reshape(ours_[f"decoder_block_1/{path}"].shape)
        assert_close(ours_[f"decoder_block_1/{path}"], expected, tolerance)


def numpy_weights(backbone):
    return [(path, keras.ops.convert_to_numpy(v.value)) for path, v in backbone.named_weights().items()]


def product_with_units(layer):
    """The kernel a layer computes with, in its own layout, out of its outputs."""
    inputs, kernel, _ = layer.equation.replace("->", ",").split(",")
    summed = list(inputs[2:])
    sizes = {"d": 42, "n": 6, "h": 16, "f": 80, "k": 2}
    shape = [sizes[letter] for letter in summed]
    units = np.eye(int(np.prod(shape)), dtype="float32").reshape(1, -1, *shape)
    outputs = keras.ops.convert_to_numpy(keras.ops.cast(layer(keras.ops.cast(units, layer.compute_dtype)), "float32"))[0]
    rest = [letter for letter in kernel if letter not in summed]
    outputs = outputs.reshape([*shape, *(sizes[letter] for letter in rest)])
    return outputs.transpose([[*summed, *rest].index(letter) for letter in kernel])


def test_quantized_values_by_hand(tmp_path):
    """int8 codes over their scales, computed here from the arrays in the file, in every slice."""
    import h5py

    quantize(their_backbone("float32"), "int8").save_to_preset(tmp_path)
    with h5py.File(tmp_path / "model.weights.h5") as file, open_weights(find_source("x", str(tmp_path))) as entries:
        path = "layers/gemma_decoder_block_2/attention/query_dense/vars"
        codes, scale = file[f"{path}/0"][()].astype("float32"), file[f"{path}/1"][()].reshape(6, 1, 16)
        tensor = entries["decoder_block_2/attention/query/kernel"].tensor
        for index in (slice(None), slice(2, 4), (slice(None), slice(3, 20)), (slice(None), slice(None), slice(1, 7))):
            np.testing.assert_array_equal(tensor[index], (codes / scale)[index])


@pytest.mark.parametrize("mode", ["int4", "int4 by channel"])
def test_slices_of_int4(tmp_path, mode):
    """Any slice equals that of the whole."""
    quantize(their_backbone("float32"), mode).save_to_preset(tmp_path)
    with open_weights(find_source("x", str(tmp_path))) as entries:
        for path in (f"decoder_block_1/{kernel}" for kernel in KERNELS):
            tensor = entries[path].tensor
            whole = tensor[:]
            assert whole.shape == tensor.shape
            for axis, size in enumerate(tensor.shape):
                for start, stop in ((0, 1), (1, 3), (size - 3, size), (1, size)):
                    index = (slice(None),) * axis + (slice(start, stop),)
                    np.testing.assert_array_equal(tensor[index], whole[index])


def test_float8_is_refused(tmp_path):
    quantize(their_backbone(), "float8").save_to_preset(tmp_path)
    with pytest.raises(CheckpointError, match="quantized to float8"):
        Gemma2Backbone.from_preset(tmp_path)


def test_scales_that_do_not_fit(tmp_path):
    import h5py

    quantize(their_backbone(), "int4").save_to_preset(tmp_path)
    stem = "layers/gemma_decoder_block/ffw_linear/vars"
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        file[f"{stem}/3"][5] = 1e9
    with pytest.raises(CheckpointError, match="ffw_linear.*blocks"):
        Gemma2Backbone.from_preset(tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        del file[f"{stem}/1"]
        file[f"{stem}/1"] = np.ones((1, 41), "float32")
    with pytest.raises(CheckpointError, match="ffw_linear.*scales"):
        Gemma2Backbone.from_preset(tmp_path)


# Out --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [10, SHARD])
@pytest.mark.parametrize("layer_types", [None, ["global"] * 3])
def test_written_folder_is_read_by_keras_hub(tmp_path, shard, layer_types):
    backbone = our_backbone(layer_types=layer_types)
    written = []
    outgoing = outgoing_from_backbone(backbone)
    given = {"sequence_length": 21, "truncation": "left"}
    ours.write_folder(tmp_path, outgoing, train_vocabulary(), (1, 107), shard, written.append, given)
    assert sum(written) == outgoing.nbytes
    lm = Gemma2CausalLM(backbone)
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path))
    assert_close(logits(theirs), logits(lm))
    assert_close(logits(theirs), oracle_logits(backbone))
    again = keras_hub.models.GemmaBackbone.from_preset(str(tmp_path))
    assert again.count_params() == backbone.config.parameter_count()
    tokenizer = keras_hub.models.GemmaTokenizer.from_preset(str(tmp_path))
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor.from_preset(str(tmp_path))
    assert preprocessor.sequence_length == theirs.preprocessor.sequence_length == 21
    assert list(tokenizer("Some text")) == list(Gemma2Tokenizer(train_vocabulary())("Some text"))
    back = Gemma2Backbone.from_preset(tmp_path)
    assert back.config == backbone.config
    for (_, a), (_, b) in zip(numpy_weights(back), numpy_weights(backbone)):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_keras_hub_saves_is_what_we_write(tmp_path, dtype):
    """Its preset, read and written again: the same JSON files, and the same files of weights to the byte of every dataset."""
    import h5py

    keras.backend.clear_session()  # names without numbers
    their_task(dtype).save_to_preset(tmp_path / "theirs", max_shard_size=SHARD)
    source = find_source("x", str(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    outgoing = outgoing_from_backbone(Gemma2Backbone.from_preset(tmp_path / "theirs"))
    ours.write_folder(tmp_path / "ours", outgoing, train_vocabulary(), (), SHARD, None, {"sequence_length": 33})
    names = sorted(str(path.relative_to(tmp_path / "theirs")) for path in (tmp_path / "theirs").rglob("*.*"))
    assert names == sorted(str(path.relative_to(tmp_path / "ours")) for path in (tmp_path / "ours").rglob("*.*"))
    for name in names:
        a, b = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name.endswith(".json"):
            ours_, theirs = json.loads(a.read_text()), json.loads(b.read_text())
            ours_.pop("date_saved", None), theirs.pop("date_saved", None)
            assert ours_ == theirs, name
        elif not name.endswith(".h5"):
            assert a.read_bytes() == b.read_bytes()
    with h5py.File(tmp_path / "ours/model_00000.weights.h5") as a, h5py.File(tmp_path / "theirs/model_00000.weights.h5") as b:
        name = "layers/reversible_embedding/vars/0"
        assert a[name].dtype == b[name].dtype and dict(a[name].attrs) == dict(b[name].attrs)
        assert a[name][()].tobytes() == b[name][()].tobytes()
    assert source.config == outgoing.config


def test_27b_is_written_right_with_a_warning(tmp_path):
    backbone = our_backbone(query_pre_attn_scalar=7)
    with pytest.warns(UserWarning, match="keras-hub 0.32 scales queries by head_dim=16"):
        ours.write_folder(tmp_path, outgoing_from_backbone(backbone))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["query_head_dim_normalize"] is False
    lm = Gemma2CausalLM.from_preset(tmp_path)
    assert lm.backbone.config.query_pre_attn_scalar == 7
    assert_close(logits(lm), oracle_logits(backbone))


def test_epsilon_that_keras_hub_ignores_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="epsilon 1e-06 in every decoder block"):
        ours.write_folder(tmp_path, outgoing_from_backbone(our_backbone(layer_norm_epsilon=1e-3)))
    assert Gemma2Backbone.from_preset(tmp_path).config.layer_norm_epsilon == 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20"),
        ({"layer_types": ["global", "local", "global"]}, "layer_types"),
        ({"layer_types": ["local"] * 3}, "layer_types"),
        ({"rope_max_wavelength": 500.0}, "rope_max_wavelength=500"),
    ],
)
def test_what_keras_hub_cannot_express(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=f"cannot express {message}"):
        ours.write_folder(tmp_path, outgoing_from_backbone(our_backbone(**changes)), train_vocabulary())
    assert not list(tmp_path.iterdir())
