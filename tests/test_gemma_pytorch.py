"""PyTorch pickles: gemma_pytorch's and Hugging Face's, of every make, and what must be refused. Nothing pickled is ever run."""

import collections
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile

import keras
import numpy as np
import pytest
import torch
from foreign_layouts import gemma_pytorch_state, our_weights, quantized, state_of
from oracle import hugging_face_folder, hugging_face_logits
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints import gemma_pytorch, without_config
from keras_gemma2.checkpoints.formats import find_source
from keras_gemma2.checkpoints.source import GEMMA_PYTORCH, HUGGING_FACE
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError

TOLERANCE = 2e-5  # as in test_parity
IDS = np.random.default_rng(1).integers(0, 97, (2, 13))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")
        yield


@pytest.fixture(scope="module")
def model():
    return hugging_face_folder()[1]


@pytest.fixture
def folder(tmp_path):
    """A folder with the config.json of the model."""
    (tmp_path / "model").mkdir()
    shutil.copy(os.path.join(hugging_face_folder()[0], "config.json"), tmp_path / "model")
    return tmp_path / "model"


def save_shards(state, folder):
    keys = sorted(state)
    weight_map = {}
    for number in range(3):
        name = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save({key: state[key] for key in keys[number::3]}, folder / name)
        weight_map |= dict.fromkeys(keys[number::3], name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def wrapped(state, path, **kwargs):
    torch.save({"model_state_dict": state, "epoch": 3}, path, **kwargs)
    return path


def old_format(state, path):
    return wrapped(state, path, _use_new_zipfile_serialization=False)


LAYOUTS = {
    "model.ckpt": lambda model, folder: wrapped(gemma_pytorch_state(model), folder / "model.ckpt").parent,
    "another name": lambda model, folder: wrapped(gemma_pytorch_state(model), folder / "gemma-2-tiny.ckpt").parent,
    "the file itself": lambda model, folder: wrapped(gemma_pytorch_state(model), folder / "weights.pt"),
    "shards": lambda model, folder: save_shards(gemma_pytorch_state(model), folder) or folder,
    "before torch 1.6": lambda model, folder: old_format(gemma_pytorch_state(model), folder / "model.ckpt"),
    "hugging face": lambda model, folder: torch.save(model.state_dict(), folder / "pytorch_model.bin") or folder,
    "hugging face shards": lambda model, folder: save_shards(state_of(model), folder) or folder,
    "hugging face base": lambda model, folder: torch.save(model.model.state_dict(), folder / "pytorch_model.bin") or folder,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_bit_for_bit_with_transformers_logits(layout, model, folder):
    lm = Gemma2CausalLM.from_preset(LAYOUTS[layout](model, folder))
    expected = our_weights(model)
    weights = lm.backbone.named_weights()
    assert sorted(weights) == sorted(expected)
    for path, variable in weights.items():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), expected[path], err_msg=path)
    logits = keras.ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))
    reference = hugging_face_logits(model, IDS)
    assert np.abs(logits - reference).max() <= TOLERANCE * np.ptp(reference)


def test_all_public_classes_load(tmp_path):
    """The tokenizer may be in the folder above: shards often have a folder of their own."""
    source, model = hugging_face_folder(vocab_size=600)
    shards = tmp_path / "shards"
    shards.mkdir()
    save_shards(gemma_pytorch_state(model), shards)
    shutil.copy(os.path.join(source, "config.json"), shards)
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    tokenizer = Gemma2Tokenizer.from_preset(shards)
    assert Gemma2CausalLMPreprocessor.from_preset(shards).tokenizer.proto == tokenizer.proto
    assert Gemma2Backbone.from_preset(shards, load_weights=False).config.vocabulary_size == 600
    lm = Gemma2CausalLM.from_preset(shards)
    assert isinstance(lm.generate("The model", max_length=8), str)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_the_default_dtype_is_the_stored_one(stored, model, folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        key: value if value.is_complex() else value.to(getattr(torch, stored)) for key, value in gemma_pytorch_state(model).items()
    }
    wrapped(state, folder / "model.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gemma 2's activations")
        backbone = Gemma2Backbone.from_preset(folder)
    assert backbone.dtype_policy.name == stored
    for path, variable in backbone.named_weights().items():
        expected = torch.from_numpy(our_weights(model)[path]).to(getattr(torch, stored)).float().numpy()
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), expected, err_msg=path)


def test_int8_is_multiplied_with_its_factors_in_float32(model, folder):
    state = quantized(gemma_pytorch_state(model), torch.bfloat16)
    wrapped(state, folder / "model.ckpt")
    backbone = Gemma2Backbone.from_preset(folder, dtype="float32")
    prefix = "model.layers.1."
    for name, path in {"mlp.down_proj": "feed_forward/down", "self_attn.o_proj": "attention/output_projection"}.items():
        key = f"{prefix}{name}.weight"
        expected = state[key].float().numpy() * state[f"{key}_scaler"].float().numpy()[:, None]
        kernel = keras.ops.convert_to_numpy(backbone.named_weights()[f"decoder_block_1/{path}/kernel"])
        np.testing.assert_array_equal(kernel, expected)
    fused = f"{prefix}self_attn.qkv_proj.weight"
    rows = state[fused].float().numpy() * state[f"{fused}_scaler"].float().numpy()[:, None]
    value = keras.ops.convert_to_numpy(backbone.named_weights()["decoder_block_1/attention/value/kernel"])
    np.testing.assert_array_equal(value, rows[-2 * 16 :])


# Without a config ------------------------------------------------------------------------------------------------------


def shapes_by_hand(layers, d, f, q, kv, vocabulary=256000):
    """gemma_pytorch's tensors of a published size; q and kv are heads times head_dim."""
    shapes = {"embedder.weight": (vocabulary, d), "model.norm.weight": (d,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.qkv_proj.weight": (q + 2 * kv, d), f"{p}self_attn.o_proj.weight": (d, q)}
        shapes |= {f"{p}mlp.gate_proj.weight": (f, d), f"{p}mlp.up_proj.weight": (f, d), f"{p}mlp.down_proj.weight": (d, f)}
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{p}{norm}_layernorm.weight"] = (d,)
    return shapes


PUBLISHED = {
    "gemma2_2b": shapes_by_hand(26, 2304, 9216, 2048, 1024),
    "gemma2_9b": shapes_by_hand(42, 3584, 14336, 4096, 2048),
    "gemma2_27b": shapes_by_hand(46, 4608, 36864, 4096, 2048),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_known_by_their_shapes(size):
    found = without_config.published_size(PUBLISHED[size], lambda config: gemma_pytorch._cells(config, {}), "here")
    assert found is NAMED_SIZES[size]


def test_a_2b_file_is_recognized_without_reading_its_weights(tmp_path):
    """A sparse file with the headers and the length of a real one: 5.2 GB of holes."""
    path = tmp_path / "model.ckpt"
    with torch._subclasses.FakeTensorMode():
        state = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in PUBLISHED["gemma2_2b"].items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model_state_dict": state}, path)
    assert path.stat().st_size > 5.2e9
    if path.stat().st_blocks * 512 > 1e8:
        pytest.skip("this file system keeps no holes")
    source = find_source("it", str(path))
    assert source.kind == GEMMA_PYTORCH and source.config is NAMED_SIZES["gemma2_2b"] and source.dtype is None


@pytest.fixture
def tiny_is_published(tiny, monkeypatch):
    monkeypatch.setitem(NAMED_SIZES, "tiny", Gemma2Config(**tiny))


def test_size_from_shapes_and_dtype_of_the_norms_beside_int8(tiny_is_published, tmp_path, model):
    state = {key: v if v.is_complex() else v.bfloat16() for key, v in gemma_pytorch_state(model).items()}
    wrapped(quantized(state), tmp_path / "model.ckpt")
    assert Gemma2Backbone.from_preset(tmp_path).dtype_policy.name == "bfloat16"
    wrapped(state, tmp_path / "model.ckpt")
    source = find_source("it", str(tmp_path))
    assert source.config.query_pre_attn_scalar == 20 and source.dtype is None


def test_another_size_without_a_config_says_what_is_missing(tmp_path, model):
    wrapped(gemma_pytorch_state(model), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"4 layers.*gemma2_27b.*config.json beside.*'embedder.weight': \(97, 42\)"):
        Gemma2Backbone.from_preset(tmp_path)
    gemma_1 = {key: value for key, value in gemma_pytorch_state(model).items() if "feedforward" not in key}
    wrapped(gemma_1, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="is it Gemma 1"):
        Gemma2Backbone.from_preset(tmp_path)


def test_our_own_config_beside(folder, model, tiny):
    registered = {"registered_name": "keras_gemma2>Gemma2Backbone", "config": {**tiny, "dtype": "float32"}}
    (folder / "config.json").write_text(json.dumps(registered))
    wrapped(gemma_pytorch_state(model), folder / "model.ckpt")
    assert find_source("it", str(folder)).kind == GEMMA_PYTORCH
    assert Gemma2Backbone.from_preset(folder).config == Gemma2Config(**tiny)


def test_safetensors_come_before_pickles(folder, model):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    shutil.copy(os.path.join(hugging_face_folder()[0], "model.safetensors"), folder)
    assert find_source("it", str(folder)).kind == HUGGING_FACE


# Safety ----------------------------------------------------------------------------------------------------------------


class Planted:
    """A pickle that leaves a file behind when it is loaded as pickles are."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').write('ran')",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_planted_code_is_refused_and_not_run(zipped, folder, model):
    mark = folder.parent / "mark"
    state = {**gemma_pytorch_state(model), "planted": Planted(mark)}
    wrapped(state, folder / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="running code that is pickled in it"):
        Gemma2Backbone.from_preset(folder)
    assert not mark.exists()
    torch.load(folder / "model.ckpt", weights_only=False)
    assert mark.exists()  # the plant works where it is let


def repacked(path, compression, edit=lambda name, data: data):
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, edit(name, data))


CHANGES = {
    "junk": (lambda state: state.update(step=3), "named tensors only.*'step' of type int"),
    "number for a name": (lambda state: state.update({5: torch.ones(1)}), "named tensors only.*5"),
    "unknown": (lambda state: state.update(bias=torch.ones(3)), "Unknown: .*'bias'"),
    "missing": (lambda state: state.pop("model.norm.weight"), "Missing: .*'model.norm.weight'"),
    "shape": (lambda state: state.update({"model.norm.weight": torch.ones(43)}), r"model.norm.weight.*\(43,\).*\(42,\)"),
    "integers": (lambda state: state.update({"model.norm.weight": torch.ones(42, dtype=torch.int32)}), "dtype int32"),
    "int8 alone": (
        lambda state: state.update({"model.norm.weight": torch.ones(42, dtype=torch.int8)}),
        "no 'model.norm.weight_scaler'",
    ),
    "sparse": (lambda state: state.update({"model.norm.weight": torch.ones(42).to_sparse()}), "sparse_coo"),
    "no data": (lambda state: state.update({"model.norm.weight": torch.ones(42, device="meta")}), "on meta"),
    "stretched": (lambda state: state.update({"model.norm.weight": torch.zeros(1).expand(1 << 40)}), "fewer bytes"),
}


@pytest.mark.backend_free
@pytest.mark.parametrize("change", CHANGES)
def test_other_contents_are_refused(change, folder, model):
    edit, message = CHANGES[change]
    state = gemma_pytorch_state(model)
    edit(state)
    wrapped(state, folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(folder)


def test_a_wrong_scaler_is_refused(folder, model):
    state = quantized(gemma_pytorch_state(model))
    state["embedder.weight_scaler"] = torch.ones(96)
    wrapped(state, folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"embedder.weight_scaler.*\(97, 42\).*\(96,\)"):
        Gemma2Backbone.from_preset(folder)


def test_transposed_and_foreign_byte_orders_are_read(folder, model):
    state = gemma_pytorch_state(model)
    key = "model.layers.2.mlp.down_proj.weight"
    path = wrapped({**state, key: state[key].T.contiguous().T}, folder / "model.ckpt")
    expected = our_weights(model)["decoder_block_2/feed_forward/down/kernel"]

    def down():
        kernel = Gemma2Backbone.from_preset(folder).named_weights()["decoder_block_2/feed_forward/down/kernel"]
        return keras.ops.convert_to_numpy(kernel)

    np.testing.assert_array_equal(down(), expected)
    real = {key: value for key, value in state.items() if not value.is_complex()}
    path = wrapped(real, folder / "model.ckpt")

    def swap(name, data):
        if name.endswith("/byteorder"):
            return b"big"
        return np.frombuffer(data, "<f4").astype(">f4").tobytes() if "/data/" in name else data

    repacked(path, zipfile.ZIP_STORED, swap)
    np.testing.assert_array_equal(down(), expected)


class Booby:
    """An OrderedDict with attributes where its methods are."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"items": 5, "get": 5, "keys": 5}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_parameters_are_read_and_attributes_ignored(zipped, folder, model):
    state = {key: torch.nn.Parameter(value) for key, value in gemma_pytorch_state(model).items()}
    state["model.norm.weight"].data_ptr = 5
    wrapped(state, folder / "model.ckpt", _use_new_zipfile_serialization=zipped)
    scale = Gemma2Backbone.from_preset(folder).named_weights()["final_norm/scale"]
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(scale), our_weights(model)["final_norm/scale"])
    torch.save(Booby(), folder / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="Missing"):
        Gemma2Backbone.from_preset(folder)


def test_packed_and_damaged_files_are_refused(folder, model):
    path = wrapped(gemma_pytorch_state(model), folder / "model.ckpt")
    whole = path.read_bytes()
    repacked(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="stored as they are"):
        Gemma2Backbone.from_preset(folder)
    for damaged in (whole[: len(whole) // 2], whole[:100], whole[:4], b"", b"not a checkpoint at all", b"\x80\x02}q\x00."):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.ckpt"):
            Gemma2Backbone.from_preset(folder)


@pytest.mark.backend_free
@pytest.mark.parametrize("file", ["zip", "old"])
def test_mutated_files_raise_nothing_but_checkpoint_errors(file, folder, model):
    """Flipped bytes in and around the pickle and the directory; flips in the numbers load, as they do in any format."""
    state = {"model_state_dict": gemma_pytorch_state(model)}
    path = folder / "model.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=file == "zip")
    whole, draw = path.read_bytes(), np.random.default_rng(5)
    source = gemma_pytorch.read_source("it", str(folder))
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in draw.integers(0, 2, 3):  # the head holds the pickle, the end the directory
            at = int(draw.integers(0, 12000)) if place else len(data) - 1 - int(draw.integers(0, 6000))
            data[at] = int(draw.integers(0, 256))
        path.write_bytes(data[: int(draw.integers(1, len(data)))] if draw.random() < 0.2 else data)
        with gemma_pytorch.contextlib.ExitStack() as stack:
            try:
                tensors, _ = gemma_pytorch.open_tensors(source, source.config, stack)
                _ = [tensor[slice(0, 1)] for tensor in tensors.values() if tensor.shape]
            except CheckpointError:
                refused += 1
    assert refused > 10


def test_folders_that_lead_elsewhere_are_refused(folder, model):
    state = gemma_pytorch_state(model)
    save_shards(state, folder)
    index = folder / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    for name in ("../../x", "/etc/passwd", "..", 7):
        index.write_text(json.dumps({"weight_map": {**values["weight_map"], "embedder.weight": name}}))
        with pytest.raises(CheckpointError, match="own folder|not in the folder"):
            Gemma2Backbone.from_preset(folder)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(CheckpointError, match="weight_map"):
        Gemma2Backbone.from_preset(folder)
    index.write_text(json.dumps(values))
    torch.save({"model.norm.weight": state["model.norm.weight"]}, folder / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(CheckpointError, match="stands twice|Missing"):
        Gemma2Backbone.from_preset(folder)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00003.bin.*Download"):
        Gemma2Backbone.from_preset(folder)


def test_of_several_checkpoints_one_must_be_named(folder, model):
    wrapped(gemma_pytorch_state(model), folder / "a.ckpt")
    shutil.copy(folder / "a.ckpt", folder / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"several checkpoints: \['a.ckpt', 'b.ckpt'\]"):
        Gemma2Backbone.from_preset(folder)
    assert Gemma2Backbone.from_preset(folder / "b.ckpt").config.num_layers == 4


def test_without_torch_the_message_names_the_install(folder, model, monkeypatch):
    wrapped(gemma_pytorch_state(model), folder / "model.ckpt")
    source = find_source("it", str(folder))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch"), gemma_pytorch.contextlib.ExitStack() as stack:
        gemma_pytorch.open_tensors(source, source.config, stack)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell where a file is mapped")
def test_tensors_are_read_from_the_file_and_not_through_its_map(folder, model):
    """Otherwise the map's pages would count beside the model's own memory."""
    from keras_gemma2.checkpoints.safetensors_file import SafetensorsTensor

    wrapped(gemma_pytorch_state(model), folder / "model.ckpt")
    source = find_source("it", str(folder))
    with gemma_pytorch.contextlib.ExitStack() as stack:
        tensors, _ = gemma_pytorch.open_tensors(source, source.config, stack)
        assert {type(tensor) for tensor in tensors.values()} == {SafetensorsTensor}


@pytest.mark.backend_free
def test_recognizing_a_checkpoint_with_a_config_imports_nothing_heavy(folder, model):
    wrapped(gemma_pytorch_state(model), folder / "model.ckpt")
    code = (
        "import sys; from keras_gemma2.checkpoints.formats import find_source;"
        f"assert find_source('it', {str(folder)!r}).kind == 'gemma_pytorch';"
        "print(sorted({'numpy', 'torch', 'keras', 'tensorstore'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
