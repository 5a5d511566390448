"""Presets of our own: what Keras writes we read bit by bit, what we write Keras reads; and hostile h5 files."""

import contextlib
import json
import random
import re
import shutil
import warnings

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints import keras_preset
from keras_gemma2.checkpoints.h5_file import open_h5
from keras_gemma2.checkpoints.h5_weights import shard_bytes
from keras_gemma2.checkpoints.reading import find_source, open_weights, vocabulary
from keras_gemma2.checkpoints.writing import outgoing_from_backbone, outgoing_from_entries
from keras_gemma2.errors import CheckpointError, MissingFileError

SHARD = 60_000 / 2**30  # GB; the tiny embedding alone has 50,400 bytes in bfloat16
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")
        warnings.filterwarnings("ignore", message="Gemma 2's activations")  # of float16
        yield


@pytest.fixture
def arguments(tiny):
    """A model as small as the vocabulary of the tests allows."""
    return {**tiny, "vocabulary_size": 600}


def random_backbone(arguments, dtype="float32"):
    backbone = Gemma2Backbone(**arguments, dtype=dtype)
    random_values = np.random.default_rng(5)
    for variable in backbone.named_weights().values():  # norms, too, which start at one value
        variable.assign(random_values.normal(size=variable.shape))
    return backbone


def task(arguments, dtype="float32", **tokenizer):
    tokenizer = Gemma2Tokenizer(train_vocabulary(), **tokenizer)
    preprocessor = Gemma2CausalLMPreprocessor(tokenizer, sequence_length=33, truncation="left", add_end_token=False)
    return Gemma2CausalLM(random_backbone(arguments, dtype), preprocessor)


def bits(backbone):
    """Every weight's bytes; comparing floats would take -0.0 for 0.0."""
    return {path: keras.ops.convert_to_numpy(v.value).tobytes() for path, v in backbone.named_weights().items()}


def read_json(path):
    return json.loads(path.read_text())


# What Keras writes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [None, SHARD])
def test_what_keras_saves_is_read_bit_by_bit(tmp_path, arguments, dtype, shard):
    backbone = random_backbone(arguments, dtype)
    keras_weights(backbone, tmp_path, shard and shard * BYTES[dtype] / 2)
    with open(tmp_path / "config.json", "w") as file:
        json.dump(keras.saving.serialize_keras_object(backbone), file)
    loaded = Gemma2Backbone.from_preset(tmp_path)
    assert loaded.dtype_policy.name == dtype and bits(loaded) == bits(backbone)


def keras_weights(backbone, folder, shard=None):
    """Keras's own writer."""
    name = "model.weights.h5" if shard is None else "model.weights.json"
    backbone.save_weights(folder / name, max_shard_size=shard)
    assert shard is None or len(list(folder.glob("model_*.weights.h5"))) > 2


def test_slices_equal_those_of_h5py(tmp_path):
    """Rows, columns, a middle axis; groups with so many members that their tree has levels; long and short names."""
    values = np.random.default_rng(2)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for i in range(300):  # a node has up to 256 members
            name = f"layers/block_{i}" + "_" * (i % 50)
            shape = (3, 5, 4) if i % 2 else (7, 6)
            dtype = (np.float32, np.float16, np.float64, np.int8, ml_dtypes.bfloat16)[i % 5]
            dataset = file.create_dataset(f"{name}/vars/0", data=(values.normal(size=shape) * 50).astype(dtype))
            if dtype is ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
            file[name].create_group("seed_generator/vars")["0"] = np.zeros(2, np.uint32)
    indices = [slice(1, 3), slice(None), (slice(None), slice(2, 4)), (slice(0, 2), slice(1, 3)), (slice(None), slice(0, 9))]
    with contextlib.ExitStack() as stack, h5py.File(tmp_path / "x.h5") as file:
        tensors = open_h5(str(tmp_path / "x.h5"), stack)
        assert len(tensors) == 300
        for name, tensor in tensors.items():
            for index in indices:
                expected = file[name][()][index]
                assert tensor[index].shape == expected.shape and tensor[index].tobytes() == expected.tobytes()


def test_memory_stays_at_what_is_asked_for(tmp_path):
    """Rows of a tensor are read, not the tensor."""
    import tracemalloc

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["layers/a/vars/0"] = np.ones((4000, 1000), np.float32)
    with contextlib.ExitStack() as stack:
        tensor = open_h5(str(tmp_path / "x.h5"), stack)["layers/a/vars/0"]
        tracemalloc.start()
        assert tensor[100:200].sum() == 100_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 600_000  # the rows have 400,000 bytes, the tensor 16,000,000


# What we write ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [10, SHARD])
def test_written_folder_is_what_keras_hub_writes(tmp_path, arguments, dtype, shard):
    keras.backend.clear_session()  # names without numbers
    lm = task(arguments, dtype, extra_stop_token_ids=(4, 5))
    shard = shard if shard == 10 else shard * BYTES[dtype] / 2
    (tmp_path / "ours").mkdir()
    lm.save_to_preset(tmp_path / "theirs", max_shard_size=shard)  # keras-hub's saver writes these files
    given = {"sequence_length": 33, "truncation": "left", "add_end_token": False}
    written = []
    outgoing = outgoing_from_backbone(lm.backbone)
    keras_preset.write_folder(tmp_path / "ours", outgoing, train_vocabulary(), (4, 5), shard, written.append, given)
    assert sum(written) == outgoing.nbytes
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    for name in files(tmp_path / "ours"):
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name == "metadata.json":  # a saver of keras-hub lists a task by its first base class, which for ours is a mix-in
            same = {**read_json(theirs), "date_saved": read_json(ours)["date_saved"], "tasks": ["CausalLM"]}
            assert read_json(ours) == same
        elif name.endswith(".json"):
            assert read_json(ours) == read_json(theirs), name
        elif name.endswith(".h5"):
            assert datasets(ours) == datasets(theirs)
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def datasets(path):
    """Name, type, attributes and bytes of everything h5py finds in a file."""
    found = {}
    with h5py.File(path) as file:

        def look(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = (item.dtype.str, item.shape, dict(item.attrs), item[()].tobytes())

        file.visititems(look)
    return found


@pytest.mark.parametrize("shard", [None, SHARD])
def test_written_folder_is_read_by_keras_and_by_us(tmp_path, arguments, shard):
    backbone = random_backbone(arguments, "bfloat16")
    keras_preset.write_folder(tmp_path, outgoing_from_backbone(backbone), train_vocabulary(), (), shard)
    assert bits(Gemma2CausalLM.from_preset(tmp_path).backbone) == bits(backbone)
    other = Gemma2Backbone(**arguments, dtype="bfloat16")
    other.load_weights(tmp_path / ("model.weights.h5" if shard is None else "model.weights.json"))
    assert bits(other) == bits(backbone)


def test_conversion_between_folders_is_bit_exact(tmp_path, arguments):
    """Entries of one preset to another, to shards and back to one file, without a model."""
    backbone = random_backbone(arguments, "bfloat16")
    for name in "abc":
        (tmp_path / name).mkdir()
    keras_preset.write_folder(tmp_path / "a", outgoing_from_backbone(backbone), train_vocabulary())
    for source, target, shard in (("a", "b", SHARD), ("b", "c", 10)):
        found = find_source(source, str(tmp_path / source))
        with open_weights(found) as entries:
            outgoing = outgoing_from_entries(entries, found.config, "bfloat16")
            keras_preset.write_folder(tmp_path / target, outgoing, vocabulary(found), (), shard)
    assert (tmp_path / "a/model.weights.h5").read_bytes() == (tmp_path / "c/model.weights.h5").read_bytes()
    assert vocabulary(find_source("c", str(tmp_path / "c"))) == train_vocabulary()


def test_without_a_tokenizer(tmp_path, arguments):
    backbone = random_backbone(arguments)
    keras_preset.write_folder(tmp_path, outgoing_from_backbone(backbone))
    assert files(tmp_path) == ["config.json", "metadata.json", "model.weights.h5", "task.json"]
    lm = Gemma2CausalLM.from_preset(tmp_path)
    assert lm.preprocessor is None and bits(lm.backbone) == bits(backbone)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Gemma2Tokenizer.from_preset(tmp_path)


def test_a_weight_larger_than_a_shard(tmp_path, arguments):
    with pytest.raises(CheckpointError, match="tied_embedding.*100800 bytes.*99999.*max_shard_size"):
        keras_preset.write_folder(tmp_path, outgoing_from_backbone(random_backbone(arguments)), None, (), 99999 / 2**30)


def test_shard_sizes():
    assert shard_bytes(2) == 2 * 2**30 and shard_bytes("5GB") == 5e9 and shard_bytes("1.5 GiB") == 1.5 * 2**30
    for wrong in (0, -1, "5 apples", True, [], float("nan")):
        with pytest.raises(ValueError, match="max_shard_size"):
            shard_bytes(wrong)


@pytest.mark.parametrize("format", ["keras_gemma2", "keras_hub"])
@pytest.mark.filterwarnings("ignore:keras-hub 0.32")
def test_shard_sizes_of_a_model(tmp_path, arguments, format):
    """As a number of GB or as a text; a wrong one is refused before anything is written."""
    same = {"rope_max_wavelength": 1e4, "layer_norm_epsilon": 1e-6, "query_pre_attn_scalar": None}  # what keras-hub can express
    backbone = random_backbone({**arguments, **same})
    for name, size in (("text", "120KB"), ("number", 120_000 / 2**30), ("whole", None), ("large", "5GB")):
        backbone.save_to_preset(tmp_path / name, format=format, max_shard_size=size)
    assert files(tmp_path / "text") == files(tmp_path / "number") and "model_00001.weights.h5" in files(tmp_path / "text")
    assert (
        files(tmp_path / "whole")
        == files(tmp_path / "large")
        == ["config.json", "metadata.json", "model.weights.h5", *TASK[format]]
    )
    for path in (tmp_path / "text").glob("*.h5"):
        assert sum(len(data) for *_, data in datasets(path).values()) <= 120_000
    assert bits(Gemma2Backbone.from_preset(tmp_path / "text")) == bits(backbone)
    before = files(tmp_path)
    for wrong in ("foo", 0, -1, "", True, [1], "5 apples"):
        with pytest.raises(ValueError, match=r"`max_shard_size` must be .*" + re.escape(repr(wrong))):
            backbone.save_to_preset(tmp_path / "new", format=format, max_shard_size=wrong)
    with pytest.raises(TypeError, match=r"Gemma2Tokenizer.save_to_preset` takes .*max_shard_size"):
        Gemma2Tokenizer(train_vocabulary()).save_to_preset(tmp_path / "new", max_shard_size=1)
    assert files(tmp_path) == before


TASK = {"keras_gemma2": [], "keras_hub": ["task.json"]}  # the second's writer writes whole models


# The four classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [10, SHARD])
def test_round_trip_of_all_four_classes(tmp_path, arguments, shard):
    lm = task(arguments, "bfloat16", extra_stop_token_ids=(4, 5))
    lm.save_to_preset(tmp_path / "preset", max_shard_size=shard)
    loaded = Gemma2CausalLM.from_preset(tmp_path / "preset")
    assert bits(loaded.backbone) == bits(lm.backbone) and loaded.backbone.config == lm.backbone.config
    tokenizer = Gemma2Tokenizer.from_preset(tmp_path / "preset")
    for preprocessor in (loaded.preprocessor, Gemma2CausalLMPreprocessor.from_preset(tmp_path / "preset")):
        assert (preprocessor.sequence_length, preprocessor.truncation, preprocessor.add_end_token) == (33, "left", False)
        assert preprocessor.tokenizer.stop_token_ids == tokenizer.stop_token_ids == (1, 107, 4, 5)
    assert tokenizer.tokenize("Some text") == pytest.approx(lm.preprocessor.tokenizer.tokenize("Some text"))
    assert Gemma2CausalLM.from_preset(tmp_path / "preset", dtype="float32").backbone.dtype_policy.name == "float32"


def test_dtype_and_load_weights(tmp_path, arguments):
    backbone = random_backbone(arguments, "bfloat16")
    backbone.save_to_preset(tmp_path / "preset")
    wide = Gemma2Backbone.from_preset(tmp_path / "preset", dtype="float32")
    assert {v.dtype for v in wide.variables} == {"float32"}
    for path, variable in wide.named_weights().items():  # bfloat16 to float32 loses nothing
        expected = keras.ops.convert_to_numpy(keras.ops.cast(backbone.named_weights()[path], "float32"))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), expected)
    empty = Gemma2Backbone.from_preset(tmp_path / "preset", load_weights=False)
    assert empty.dtype_policy.name == "bfloat16" and bits(empty) != bits(backbone)
    for file in (tmp_path / "preset").glob("*.h5"):
        file.unlink()
    assert Gemma2CausalLM.from_preset(tmp_path / "preset", load_weights=False).backbone.config == backbone.config
    with pytest.raises(MissingFileError, match=r"No model.weights.h5"):
        Gemma2CausalLM.from_preset(tmp_path / "preset")


def test_mixed_precision_and_dropout_survive(tmp_path, arguments):
    """Dropout's seeds may be saved beside the weights."""
    backbone = random_backbone({**arguments, "dropout": 0.1}, "mixed_bfloat16")
    backbone.save_to_preset(tmp_path / "preset")
    with h5py.File(tmp_path / "preset" / "model.weights.h5", "a") as file:  # as older versions of Keras save them
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    loaded = Gemma2Backbone.from_preset(tmp_path / "preset")
    assert loaded.dtype_policy.name == "mixed_bfloat16" and bits(loaded) == bits(backbone) and loaded.config.dropout == 0.1


# What must be refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, arguments):
    """A preset to break."""
    keras_preset.write_folder(tmp_path, outgoing_from_backbone(random_backbone({**arguments, "num_layers": 2}), "bfloat16"))
    return tmp_path


NORM = "layers/rms_norm/vars/0"


def external_link(file, path):
    file[NORM] = h5py.ExternalLink("/etc/hostname", "/x")


def soft_link(file, path):
    file[NORM] = h5py.SoftLink("/layers/tied_embedding/vars/0")


def external_storage(file, path):
    file.create_dataset(NORM, (42,), "f4", external=[("/etc/passwd", 0, 168)])


def virtual(file, path):
    layout = h5py.VirtualLayout((42,), "f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "x", (42,))
    file.create_virtual_dataset(NORM, layout)


def bomb(file, path):
    file.create_dataset(NORM, (1 << 60,), "f4", chunks=(1 << 20,))


def compressed_bomb(file, path):
    file.create_dataset(NORM, data=np.zeros((1 << 20,), "f4"), chunks=(1 << 16,), compression="gzip")


def text(file, path):
    file.create_dataset(NORM, data=["a"] * 42, dtype=h5py.string_dtype())


def two_byte_blobs(file, path):
    file.create_dataset(NORM, data=np.zeros(42, "V2"))


def hard_link_cycle(file, path):
    del file["layers/tied_embedding"]
    file["layers/tied_embedding"] = file["layers"]


def big_endian(file, path):
    file.create_dataset(NORM, data=np.zeros(42, ">f4"))


def wrong_shape(file, path):
    file.create_dataset(NORM, data=np.zeros(43, "f4"))


def unknown_weight(file, path):
    file.create_dataset(NORM, data=np.zeros(42, "f4"))
    file["layers/lora/vars/0"] = np.zeros(3, "f4")


@pytest.mark.parametrize(
    "change, message",
    [
        (external_link, "rms_norm"),
        (soft_link, "soft link"),
        (external_storage, "other files"),
        (virtual, "virtual|other layout"),
        (bomb, "chunks"),
        (compressed_bomb, "chunks.*h5repack"),
        (text, "read are float32"),
        (two_byte_blobs, "opaque bytes"),
        (hard_link_cycle, "used twice"),
        (big_endian, "read are float32"),
        (wrong_shape, r"\(43,\).*\(42,\)"),
        (unknown_weight, "Unknown: .*lora"),
        (lambda file, path: None, "Missing: .*rms_norm"),
    ],
)
def test_hostile_datasets(folder, change, message):
    path = folder / "model.weights.h5"
    with h5py.File(path, "a") as file:
        del file[NORM]
        change(file, path)
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(folder)


def test_damaged_files(folder):
    path = folder / "model.weights.h5"
    whole = path.read_bytes()
    for broken in (b"", b"garbage" * 1000, whole[:50], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.weights\.h5"):
            Gemma2Backbone.from_preset(folder)
    with h5py.File(path, "w", libver="latest") as file:
        file[NORM] = np.zeros(42, "f4")
    with pytest.raises(CheckpointError, match="another layout"):
        Gemma2Backbone.from_preset(folder)


def test_fuzzed_files(folder, tmp_path_factory):
    """Whatever bytes are changed, the reader finds the same tensors as h5py, or refuses the file."""
    whole = (folder / "model.weights.h5").read_bytes()
    path = tmp_path_factory.mktemp("fuzz") / "model.weights.h5"
    with contextlib.ExitStack() as stack:
        regions = [(t.offset, t.offset + t.nbytes) for t in open_h5(str(folder / "model.weights.h5"), stack).values()]
    outside = [i for i in range(len(whole)) if not any(start <= i < stop for start, stop in regions) and whole[i]]
    refused = 0
    for seed in range(200):
        path.write_bytes(mutated(whole, outside, random.Random(seed)))
        with contextlib.ExitStack() as stack:
            try:
                tensors = open_h5(str(path), stack)
                assert sum(tensor.nbytes for tensor in tensors.values()) <= len(whole)
                for tensor in tensors.values():
                    _ = tensor.shape and tensor[:]
            except CheckpointError:
                refused += 1
    assert refused > 50


def mutated(whole, places, draw):
    """Some bytes of the file's structure replaced; weights are the smaller part of the files of small models."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 8])):
        i, kind = draw.choice(places), draw.randrange(4)
        if kind == 0:
            data[i] = draw.randrange(256)
        elif kind == 1:
            data[i] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[i : i + 8] = b"\xff" * 8
        else:
            j = draw.choice(places)
            data[i : i + 8] = data[j : j + 8]
    return bytes(data)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"/a/vars": "../model_00000.weights.h5"}}, "only files of its own folder"),
        ({"weight_map": {"/a/vars": ["/etc/passwd"]}}, "only files of its own folder"),
        ({"weight_map": {"/a/vars": "model_00009.weights.h5"}}, "which is not in the folder"),
        ({"weight_map": {"/a/vars": [{}, 3]}}, "only files of its own folder|not in the folder"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["a"]}, "weight_map"),
        ({"weight_map": {"/a/vars": ["a.weights.h5", "b.weights.h5"]}}, "stands in two files"),
    ],
)
def test_hostile_indices(folder, index, message):
    for name in "ab":
        shutil.copy(folder / "model.weights.h5", folder / f"{name}.weights.h5")
    (folder / "model.weights.h5").unlink()
    (folder / "model.weights.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 10**12, "layer_types": None}, "num_layers"),
        ({"hidden_dim": "42"}, "hidden_dim"),
        ({"final_logit_soft_cap": 10**400}, "final_logit_soft_cap"),
        ({"dtype": "int64"}, "dtype.*int64"),
        ({"dtype": {"module": "os", "class_name": "system", "config": {"name": "true"}}}, "dtype"),
        ({"dtype": {"class_name": "DTypePolicyMap", "config": {"default_policy": ["x"]}}}, "dtype"),
    ],
)
def test_hostile_configs(folder, change, message):
    values = read_json(folder / "config.json")
    values["config"].update(change)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        Gemma2Backbone.from_preset(folder)
