"""Orbax checkpoints, as orbax writes them and as Google's Flax releases name and lay out the arrays."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings

import keras
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore
from foreign_layouts import flax_arrays, our_weights
from oracle import hugging_face_folder, hugging_face_logits
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints import flax, orbax_arrays, without_config
from keras_gemma2.checkpoints.formats import find_source
from keras_gemma2.checkpoints.source import FLAX
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError

TOLERANCE = 2e-5  # as in test_parity
IDS = np.random.default_rng(1).integers(0, 97, (2, 13))
NORM = "transformer/final_norm/scale"


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


def nested(arrays):
    """{"transformer": {"layer_0": {"attn": {"q_einsum": {"w": ...}}}}}"""
    tree = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        at = tree
        for part in folders:
            at = at.setdefault(part, {})
        at[leaf] = array
    return tree


def joined(arrays):
    """{"transformer/layer_0/attn/q_einsum": {"w": ...}}, and no `w` in the feed-forward layers, as Google's are."""
    tree = {}
    for name, array in arrays.items():
        if "/mlp/" in name:
            name = name.removesuffix("/w")
        module, _, leaf = name.rpartition("/")
        tree.setdefault(module, {})[leaf] = array
    return tree


def bare(arrays):
    return nested(arrays)["transformer"]


def save(tree, path, **options):
    """By orbax itself; the handler's usual options write one OCDBT database."""
    handler = orbax.checkpoint.PyTreeCheckpointHandler(**options)
    with orbax.checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, tree)
    return path


def save_step(tree, path):
    """A manager's folder, with the step in it."""
    with orbax.checkpoint.CheckpointManager(path.parent) as manager:
        manager.save(7, args=orbax.checkpoint.args.StandardSave(tree))
        manager.wait_until_finished()


def save_old(tree, path):
    """Plain files beside a msgpack tree, as orbax did before `_METADATA`."""
    save(tree, path, use_ocdbt=False)
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding"):
        (path / name).unlink(missing_ok=True)
    (path / "checkpoint").write_bytes(b"\x80")
    return path


LAYOUTS = {
    "nested": lambda arrays, path: save(nested(arrays), path),
    "joined, as Google's": lambda arrays, path: save(joined(arrays), path),
    "without transformer": lambda arrays, path: save(bare(arrays), path),
    "below params": lambda arrays, path: save({"params": nested(arrays)}, path),
    "plain files": lambda arrays, path: save(nested(arrays), path, use_ocdbt=False),
    "plain files, joined": lambda arrays, path: save(joined(arrays), path, use_ocdbt=False),
    "zarr3": lambda arrays, path: save(nested(arrays), path, use_zarr3=True),
    "old plain files": lambda arrays, path: save_old(nested(arrays), path),
    "a step of a manager": lambda arrays, path: save_step(nested(arrays), path),
}


def assert_bit_exact(backbone, model):
    expected = our_weights(model)
    weights = backbone.named_weights()
    assert sorted(weights) == sorted(expected)
    for path, variable in weights.items():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), expected[path], err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_bit_for_bit(layout, model, folder):
    LAYOUTS[layout](flax_arrays(model), folder / "2b-it")
    assert find_source("it", str(folder)).kind == FLAX
    assert_bit_exact(Gemma2Backbone.from_preset(folder), model)


@pytest.mark.parametrize("gates_first_in", [True, False], ids=["2 D F", "2 F D"])
def test_logits_equal_transformers(gates_first_in, model, folder):
    """The checkpoint itself passed, its config.json inside; the tokenizer's padding rows cut off as the config says."""
    path = save(joined(flax_arrays(model, gates_first_in, padding=11)), folder / "27b-it")
    shutil.copy(folder / "config.json", path)
    lm = Gemma2CausalLM.from_preset(path)
    assert_bit_exact(lm.backbone, model)
    logits = keras.ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))
    reference = hugging_face_logits(model, IDS)
    assert logits.shape == reference.shape and np.abs(logits - reference).max() <= TOLERANCE * np.ptp(reference)


def test_fused_queries_keys_and_values(tmp_path):
    source, model = hugging_face_folder(num_key_value_heads=6)
    save(joined(flax_arrays(model, fused=True)), tmp_path / "it")
    shutil.copy(os.path.join(source, "config.json"), tmp_path)
    assert_bit_exact(Gemma2Backbone.from_preset(tmp_path), model)


def test_gates_of_a_square_shape_are_ambiguous(tmp_path):
    source, model = hugging_face_folder(intermediate_size=42)
    save(joined(flax_arrays(model)), tmp_path / "it")
    shutil.copy(os.path.join(source, "config.json"), tmp_path)
    with pytest.raises(CheckpointError, match="two ways: hidden_dim and intermediate_dim are both 42"):
        Gemma2Backbone.from_preset(tmp_path)


def test_the_default_dtype_is_the_stored_one(model, folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in flax_arrays(model).items()}
    save(joined(arrays), folder / "it")
    backbone = Gemma2Backbone.from_preset(folder)
    assert backbone.dtype_policy.name == "bfloat16"
    for path, variable in backbone.named_weights().items():
        expected = our_weights(model)[path].astype(ml_dtypes.bfloat16).astype("float32")
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), expected, err_msg=path)


@pytest.mark.parametrize("inner", [False, True], ids=["the folder", "the checkpoint in it"])
def test_all_public_classes_load(inner, tmp_path):
    """As Google's releases lie: `2b-it/` beside `tokenizer.model`."""
    source, model = hugging_face_folder(vocab_size=600)
    path = save(joined(flax_arrays(model)), tmp_path / "2b-it")
    shutil.copy(os.path.join(source, "config.json"), path)
    (tmp_path / "tokenizer.model").write_bytes(train_vocabulary())
    where = path if inner else tmp_path
    assert Gemma2Tokenizer.from_preset(where).vocabulary_size() == 600
    assert Gemma2CausalLMPreprocessor.from_preset(where).tokenizer.vocabulary_size() == 600
    assert Gemma2Backbone.from_preset(where, load_weights=False).config.vocabulary_size == 600
    assert isinstance(Gemma2CausalLM.from_preset(where).generate("The model", max_length=8), str)


def test_arrays_in_several_chunks(model, folder):
    """As a mesh of devices writes them; chunks and our blocks of rows need not meet."""
    path = folder / "it"
    save(nested(flax_arrays(model)), path, use_ocdbt=False)
    name = "transformer.embedder.input_embedding"
    shutil.rmtree(path / name)
    embedding = our_weights(model)["token_embedding/embeddings"]
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path / name}/"}, "metadata": {"chunks": [25, 14]}}
    array = tensorstore.open(spec, create=True, shape=embedding.shape, dtype="float32").result()
    array.write(embedding).result()
    assert len(list((path / name).iterdir())) > 10
    assert_bit_exact(Gemma2Backbone.from_preset(folder), model)


def test_one_tensor_is_decoded_once(model, folder, monkeypatch):
    """Blocks of rows are smaller than chunks: without a cache, every block would decode the whole tensor again."""
    from keras_gemma2.checkpoints import layout, reading

    monkeypatch.setattr(layout, "ELEMENTS_A_BLOCK", 100)
    opened = []
    one = orbax_arrays._open
    monkeypatch.setattr(orbax_arrays, "_open", lambda spec, size: opened.append(size) or one(spec, size))
    save(nested(flax_arrays(model)), folder / "it")
    source = find_source("it", str(folder))
    with reading.open_weights(source) as entries:
        headers = len(opened)
        for path, shape in source.config.weight_shapes().items():  # the order in which a model is filled
            assert sum(len(block) for block in entries[path].row_blocks()) == shape[0]
    assert headers == len(flax_arrays(model)) and len(opened) == 2 * headers and set(opened[:headers]) == {0}


# Without a config ------------------------------------------------------------------------------------------------------


def shapes_by_hand(layers, d, f, n, k, h, gates_first_in, vocabulary):
    """The arrays of a published size in Google's layout."""
    shapes = {"transformer/embedder/input_embedding": (vocabulary, d), NORM: (d,)}
    for i in range(layers):
        p = f"transformer/layer_{i}/"
        shapes |= {f"{p}attn/q_einsum/w": (n, d, h), f"{p}attn/kv_einsum/w": (2, k, d, h), f"{p}attn/attn_vec_einsum/w": (n, h, d)}
        shapes |= {f"{p}mlp/gating_einsum/w": (2, d, f) if gates_first_in else (2, f, d), f"{p}mlp/linear/w": (f, d)}
        for norm in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
            shapes[f"{p}{norm}_norm/scale"] = (d,)
    return shapes


SIZES = {
    "gemma2_2b": (26, 2304, 9216, 8, 4, 256, True),
    "gemma2_9b": (42, 3584, 14336, 16, 8, 256, False),
    "gemma2_27b": (46, 4608, 36864, 32, 16, 128, False),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_known_by_their_shapes(size):
    shapes = shapes_by_hand(*SIZES[size], 256000)
    found = without_config.published_size(shapes, lambda config: flax._cells(config, shapes, "here"), "here")
    assert found is NAMED_SIZES[size]


def test_the_headers_of_a_2b_checkpoint_are_enough(tmp_path):
    """Real headers with the padded vocabulary, written by tensorstore; no data, so nothing can have been read."""
    for name, shape in shapes_by_hand(*SIZES["gemma2_2b"], 256128).items():
        folder = tmp_path / "2b-it" / name.replace("/", ".")
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": {"chunks": list(shape)}}
        tensorstore.open(spec, create=True, shape=shape, dtype="bfloat16").result()
    (tmp_path / "2b-it" / "_METADATA").write_text("{}")
    source = find_source("it", str(tmp_path))
    assert source.kind == FLAX and source.config is NAMED_SIZES["gemma2_2b"]
    with contextlib.ExitStack() as stack:
        tensors, _ = flax.open_tensors(source, source.config, stack)
        assert tensors[flax.EMBEDDING].shape == (256000, 2304) and tensors[flax.EMBEDDING].dtype.name == "bfloat16"
        with pytest.raises(CheckpointError, match="input_embedding.*cannot be read.*missing"):  # not zeros
            _ = tensors[flax.EMBEDDING][0:1]


def test_padding_is_cut_only_where_it_is_known(tmp_path, model, tiny, monkeypatch):
    """Numbers of our own instead of 256128 and 256000, in a release without a config."""
    monkeypatch.setitem(NAMED_SIZES, "tiny", Gemma2Config(**tiny))
    save(joined(flax_arrays(model, padding=11)), tmp_path / "it")
    with pytest.raises(CheckpointError, match=r"none of the published.*config.json beside.*input_embedding': \(108, 42\)"):
        Gemma2Backbone.from_preset(tmp_path)
    monkeypatch.setattr(flax, "VOCABULARY", 97)
    monkeypatch.setattr(flax, "PADDED_VOCABULARY", 108)
    assert_bit_exact(Gemma2Backbone.from_preset(tmp_path), model)


# What must be refused --------------------------------------------------------------------------------------------------


def change(arrays, name, value):
    return {**arrays, name: value} if value is not None else {key: array for key, array in arrays.items() if key != name}


CHANGES = {
    "unknown": ("transformer/lora/a", np.ones(3, "float32"), "Unknown: .*'transformer/lora/a'"),
    "missing": (NORM, None, "Missing: .*final_norm/scale"),
    "shape": (NORM, np.ones(43, "float32"), r"final_norm/scale.*\(43,\).*\(42,\)"),
    "integers": (NORM, np.ones(42, "int32"), "final_norm/scale.*int32"),
    "a smaller vocabulary": ("transformer/embedder/input_embedding", np.ones((96, 42), "float32"), r"\(96, 42\).*\(97, 42\)"),
}


@pytest.mark.backend_free
@pytest.mark.parametrize("case", CHANGES)
def test_other_contents_are_refused(case, model, folder):
    name, value, message = CHANGES[case]
    save(nested(change(flax_arrays(model), name, value)), folder / "it")
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(folder)


def test_twins_are_refused(model, folder):
    arrays = flax_arrays(model)
    save({**nested(arrays), NORM.removesuffix("/scale"): {"scale": arrays[NORM]}}, folder / "it", use_ocdbt=False)
    with pytest.raises(CheckpointError, match="Two arrays .*final_norm/scale"):
        Gemma2Backbone.from_preset(folder)


def test_of_several_checkpoints_one_must_be_named(model, folder):
    save(nested(flax_arrays(model)), folder / "2b")
    shutil.copytree(folder / "2b", folder / "2b-it")
    with pytest.raises(CheckpointError, match=r"several Flax checkpoints: \['2b', '2b-it'\]"):
        Gemma2Backbone.from_preset(folder)


@pytest.mark.parametrize("use_ocdbt", [True, False], ids=["ocdbt", "plain files"])
def test_missing_and_damaged_files_are_refused(use_ocdbt, model, folder):
    path = save(nested(flax_arrays(model)), folder / "it", use_ocdbt=use_ocdbt)
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.name[0] not in "_c" and file.parent.name != "array_metadatas"
    )
    biggest = max(files, key=lambda file: file.stat().st_size)
    whole = biggest.read_bytes()
    for damaged in (None, b"", whole[: len(whole) // 2], b"\xff" * len(whole)):
        biggest.unlink(missing_ok=True)
        if damaged is not None:
            biggest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Gemma2Backbone.from_preset(folder)


@pytest.mark.backend_free
@pytest.mark.parametrize("use_ocdbt", [True, False], ids=["ocdbt", "plain files"])
def test_mutated_files_raise_nothing_but_checkpoint_errors(use_ocdbt, model, folder):
    path = save(nested(flax_arrays(model)), folder / "it", use_ocdbt=use_ocdbt)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    source, draw, refused = find_source("it", str(folder)), np.random.default_rng(7), 0
    for _ in range(40):
        file = files[int(draw.integers(len(files)))]
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(3 if data else 0):
            data[int(draw.integers(0, len(data)))] = int(draw.integers(0, 256))
        file.write_bytes(data)
        with contextlib.ExitStack() as stack:
            try:
                tensors, _ = flax.open_tensors(source, source.config, stack)
                _ = [tensor[slice(0, 1)] for tensor in tensors.values() if tensor.shape]
            except CheckpointError:
                refused += 1
        file.write_bytes(whole)
    assert refused > 5


def test_a_chunk_larger_than_its_array_is_refused(model, folder):
    """It would be allocated, whatever the file holds."""
    path = save(nested(flax_arrays(model)), folder / "it", use_ocdbt=False)
    header = next(path.glob("*final_norm*")) / ".zarray"
    header.write_text(header.read_text().replace('"chunks":[42]', '"chunks":[1099511627776]'))
    with pytest.raises(CheckpointError, match="chunks .*larger than its shape"):
        Gemma2Backbone.from_preset(folder)


def test_an_empty_checkpoint_is_refused(folder):
    (folder / "it").mkdir()
    (folder / "it" / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="no arrays in it"):
        Gemma2Backbone.from_preset(folder)


def test_without_tensorstore_the_message_names_the_install(model, folder, monkeypatch):
    save(nested(flax_arrays(model)), folder / "it")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match="pip install orbax-checkpoint"):
        Gemma2Backbone.from_preset(folder)


@pytest.mark.backend_free
def test_recognizing_and_reading_a_checkpoint_needs_no_jax(model, folder):
    save(joined(flax_arrays(model)), folder / "it")
    code = (
        "import contextlib, sys; from keras_gemma2.checkpoints.formats import find_source;"
        f"source = find_source('it', {str(folder)!r});"
        "first = sorted({'numpy', 'jax', 'keras', 'orbax', 'tensorstore'} & set(sys.modules));"
        "from keras_gemma2.checkpoints.flax import open_tensors\n"
        "with contextlib.ExitStack() as stack: open_tensors(source, source.config, stack)\n"
        "print(first, sorted({'jax', 'keras', 'orbax'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] []"
