"""Damaged and hostile checkpoints: each is refused with a `CheckpointError` that names the place and the mend.

Pickles that would run code are in test_gemma_pytorch, links and foreign data in h5 files in test_keras_presets, headers of
GGUF files in test_gguf, archives in test_hub, interrupted saves and full disks in test_staging. `fuzz.py` runs this file's
last test for as long as one likes.
"""

import json
import os
import pickle
import shutil
import struct
import time
import warnings
import zipfile

import keras
import numpy as np
import pytest
import safetensors.numpy
import torch
from fuzz import campaign
from fuzz_seeds import FORMATS, write_seed
from test_staging import unprivileged
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints.formats import find_source
from keras_gemma2.errors import LONGEST_MESSAGE, CheckpointError, MissingFileError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
BACKENDS = ("jax", "tensorflow", "torch")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Valid checkpoints, made when they are asked for."""
    made = {}

    def seed(name):
        if name not in made:
            made[name] = write_seed(name, tmp_path_factory.mktemp("seeds") / "it")
        return made[name]

    return seed


@pytest.fixture
def folder(seeds, tmp_path):
    """A small Hugging Face folder, to break."""
    return shutil.copytree(seeds("hugging_face"), tmp_path / "model")


@pytest.fixture
def sharded(seeds, tmp_path):
    """The same in several files."""
    return shutil.copytree(seeds("hugging_face sharded"), tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, message, error=CheckpointError, load=Gemma2CausalLM.from_preset):
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        load(folder)
    text = str(caught.value)
    assert len(text) <= LONGEST_MESSAGE + 10 and "\n" not in text and time.monotonic() - start < 10
    return text


# safetensors ------------------------------------------------------------------------------------------------------------


def with_header(path, change):
    """Replaces the JSON header of a safetensors file; `change` gets it and returns a dict, or bytes as they are."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = change(json.loads(whole[8 : 8 + length]))
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + whole[8 + length :])


def of_norm(**changes):
    return lambda header: {**header, NORM: {**header[NORM], **changes}}


def moved(first=0, last=0):
    def change(header):
        start, end = header[NORM]["data_offsets"]
        return of_norm(data_offsets=[start + first, end + last])(header)

    return change


HEADERS = {
    "overlapping offsets": (moved(-4, -4), "not a complete safetensors file.*Download it again"),
    "a hole": (moved(4, 4), "not a complete safetensors file.*Download it again"),
    "beyond the end": (moved(1 << 40, 1 << 40), "not a complete safetensors file.*Download it again"),
    "longer than its shape": (moved(-4), "not a complete safetensors file.*Download it again"),
    "backwards": (of_norm(data_offsets=[8, 0]), "not a complete safetensors file.*Download it again"),
    "negative": (of_norm(data_offsets=[-8, 0]), "not a complete safetensors file.*Download it again"),
    "2**60 elements": (of_norm(shape=[1 << 60]), "not a complete safetensors file.*Download it again"),
    "an overflowing shape": (of_norm(shape=[1 << 62, 4, 1]), "not a complete safetensors file.*Download it again"),
    "an unknown dtype": (of_norm(dtype="F31"), "not a complete safetensors file.*F31"),
    "integers": (of_norm(dtype="I32"), rf"'{NORM}' .*{WEIGHTS} has dtype I32; those read are F64, F32, F16, BF16"),
    "another shape": (of_norm(shape=[1, 256]), rf"'{NORM}' .* has shape \(1, 256\); the config makes it \(256,\)"),
    "another name": (lambda header: {"x" if k == NORM else k: v for k, v in header.items()}, rf"Missing: .'{NORM}'.*Unknown"),
    "no JSON": (lambda header: b"{" * 1000, "not a complete safetensors file.*Download it again"),
    "deep JSON": (lambda header: b'{"a":' + b"[" * 100_000, "not a complete safetensors file.*Download it again"),
    "a list": (lambda header: b"[]", "not a complete safetensors file.*Download it again"),
    "not UTF-8": (lambda header: b'{"\xff": 1}', "not a complete safetensors file.*Download it again"),
    "a key twice": (
        lambda header: json.dumps(header).encode()[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'.encode(),
        f"{WEIGHTS}.*Download it again",
    ),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_headers_that_lie_are_refused(folder, lie):
    change, message = HEADERS[lie]
    with_header(folder / WEIGHTS, change)
    refused(folder, message)


@pytest.mark.parametrize("length", [0, 7, 1 << 60, (1 << 64) - 1, 100_000_001])
def test_lengths_of_headers_are_checked_against_the_file(folder, length):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + whole[8:])
    refused(folder, f"{WEIGHTS} is not a complete safetensors file.*Download it again")


def test_truncated_files_are_refused(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        refused(folder, f"{WEIGHTS} is not a complete safetensors file.*Download it again")
    (folder / WEIGHTS).write_bytes(whole + b"\0")
    refused(folder, f"{WEIGHTS} is not a complete safetensors file")


@pytest.mark.parametrize("shape", [(600, 1, 256), (153_600,), ()])
def test_a_head_of_another_shape_is_refused(folder, shape):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.reshape(shape) if shape else np.ones((), "float32")
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    refused(folder, "'lm_head.weight' .* differs from the embedding")
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].copy()
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    refused(folder, "'lm_head.weight' .* differs from the embedding")


def test_values_that_are_not_finite_are_warned_of_by_name(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][500, 3] = np.nan
    tensors[NORM][7] = -np.inf
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Gemma2Backbone.from_preset(folder)
    said = sorted(str(w.message) for w in caught if "NaN" in str(w.message))
    assert len(said) == 2 and str(folder) in said[0]
    assert "'model.layers.1.mlp.up_proj.weight'" in said[0] and f"'{NORM}'" in said[1]


# The index --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("../../x", "names the file '../../x'; only files of its own folder"),
        ("/etc/passwd", "names the file '/etc/passwd'; only files of its own folder"),
        ("..", "only files of its own folder"),
        ("a\\b", "only files of its own folder"),
        ("a\0b", "only files of its own folder"),
        ("", "only files of its own folder"),
        (7, "'7', which is not in the folder. Download it"),
        (None, "'None', which is not in the folder"),
        (["a"], "which is not in the folder"),
        ("a" * 5000, "which is not in the folder"),
        ("\ud800", "which is not in the folder"),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(sharded, name, message):
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded.parent / "x")
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**weight_map, NORM: name})
    assert INDEX in refused(sharded, message)


@pytest.mark.parametrize("value", [None, {}, [], "x", 5])
def test_an_index_without_a_map_is_refused(sharded, value):
    edit(sharded / INDEX, weight_map=value)
    refused(sharded, f"{INDEX} must hold a `weight_map` .*Download it again")


def test_shards_that_are_missing_or_overlap(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    whole = second.read_bytes()
    shutil.copy(first, second)  # the same keys in two files
    refused(sharded, "The tensor '.*' stands twice in the safetensors")
    second.unlink()
    refused(sharded, f"names the file '{second.name}', which is not in the folder. Download it", MissingFileError)
    second.mkdir()
    refused(sharded, f"names the file '{second.name}', which is not in the folder", MissingFileError)
    second.rmdir()
    second.write_bytes(whole)
    assert Gemma2Backbone.from_preset(sharded).config.num_layers == 2


# config.json ------------------------------------------------------------------------------------------------------------

NUMBERS = (
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
NULLABLE = ("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
WRONG = ("x", [1], {"a": 1}, True, -1, 0, 10**30, 10**400, float("nan"), float("inf"), "1" * 5000)


@pytest.mark.parametrize("key", [*NUMBERS, *NULLABLE])
def test_numbers_of_the_config(folder, key):
    """Every wrong value is named under the file's own key."""
    values = json.loads((folder / "config.json").read_text())
    for value in [*WRONG, *([None] if key in NUMBERS else [])]:
        if key in ("rms_norm_eps", *NULLABLE[1:]) and value == 10**30:
            continue  # large, and still a float
        (folder / "config.json").write_text(json.dumps({**values, key: value, "layer_types": None}))
        refused(folder, rf"config.json: `{key}` must be .*Received: {key}=", load=Gemma2Backbone.from_preset)


FIELDS = [
    ({"num_hidden_layers": 10**9, "layer_types": None}, "`num_hidden_layers` must be at most 10000"),
    ({"num_hidden_layers": 10**9, "layer_types": None, "sliding_window": None}, "`num_hidden_layers` must be at most 10000"),
    ({"num_hidden_layers": 10**30, "layer_types": None, "sliding_window": None}, "`num_hidden_layers` must be at most 10000"),
    ({"num_hidden_layers": 10000, "layer_types": None}, r"Missing: .*109978 in all"),
    ({"vocab_size": 601}, r"'model.embed_tokens.weight'.*\(600, 256\).*\(601, 256\)"),
    ({"hidden_size": 2**31 - 1}, r"has shape .*2147483647"),
    ({"layer_types": "full_attention"}, "`layer_types` must be a list. Received: 'full_attention'"),
    ({"layer_types": 5}, "`layer_types` must be a list. Received: 5"),
    ({"layer_types": {"a": 1}}, "`layer_types` must be a list"),
    ({"layer_types": ["full_attention"]}, "`layer_types` must have one entry for each"),
    ({"layer_types": ["full_attention", 7]}, "`layer_types` entries must be among .*Received: 7"),
    ({"layer_types": ["full_attention", ["x"]]}, "`layer_types` entries must be among"),
    ({"rope_parameters": "x"}, "`rope_parameters` and `rope_scaling` must be objects or null. Received: 'x'"),
    ({"rope_parameters": [1]}, "`rope_parameters` and `rope_scaling` must be objects"),
    ({"rope_parameters": {"rope_theta": "x"}}, "`rope_theta` must be a positive, finite number.*'x'"),
    ({"rope_parameters": {"rope_theta": None}}, "`rope_theta` must be a positive, finite number.*None"),
    ({"rope_parameters": {"rope_theta": 10**400}}, "`rope_theta` must be a positive, finite number"),
    ({"rope_parameters": {"rope_theta": 1.0, "rope_type": ["x"]}}, "`rope_type` must be 'default'"),
    ({"rope_theta": [500.0]}, "`rope_theta` must be a positive, finite number"),
    ({"rope_theta": True}, "`rope_theta` must be a positive, finite number"),
    ({"hidden_activation": ["x"]}, "`hidden_activation` must be 'gelu_pytorch_tanh'"),
    ({"torch_dtype": "int3", "dtype": None}, "`torch_dtype` must be one of float64, float32, float16, bfloat16.*'int3'"),
    ({"dtype": "int3"}, "`dtype` must be one of"),
    ({"dtype": ["float32"]}, "`dtype` must be one of"),
    ({"dtype": 16}, "`dtype` must be one of"),
    ({"model_type": "gemma"}, "config.json.*must describe a Gemma 2.*model_type='gemma'"),
    ({"model_type": "gemma3_text"}, "model_type='gemma3_text'"),
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"model_type": None}, "model_type=None"),
    ({"model_type": ["gemma2"]}, r"model_type=\['gemma2'\]"),
]


@pytest.mark.parametrize("changes, message", FIELDS)
def test_fields_of_the_config(folder, changes, message):
    edit(folder / "config.json", **changes)
    if "rope_theta" in changes:
        edit(folder / "config.json", rope_parameters=None)
    refused(folder, message)


@pytest.mark.parametrize("ids", ["x", 1.5, True, {"a": 1}, [1, "x"], [[1]], [None]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_ids_that_are_none(folder, name, ids):
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    edit(folder / name, eos_token_id=ids)
    refused(folder, f"{name}: `eos_token_id` must be a token id or a list of them")


@pytest.mark.parametrize("ids, expected", [(-1, ()), (10**30, ()), ([1, 107, 600, 599], (1, 107, 599)), (None, ()), ([], ())])
def test_stop_ids_that_no_token_has_are_passed_over(folder, ids, expected):
    edit(folder / "generation_config.json", eos_token_id=ids)
    assert find_source("it", str(folder)).stop_token_ids == expected


def test_dtypes_as_older_files_spell_them(folder):
    edit(folder / "config.json", dtype=None, torch_dtype="torch.bfloat16")
    assert find_source("it", str(folder)).dtype == "bfloat16"


# JSON -------------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty": (b"", "not valid JSON.*Download it again"),
    "cut off": (b'{"model_type": "gemma2", ', "not valid JSON.*Download it again"),
    "two": (b"{}{}", "not valid JSON"),
    "a list": (b"[]", "must hold a JSON object. Received: list"),
    "deep": (b'{"a":' * 200_000, "not valid JSON.*Download it again"),
    "deep lists": (b"[" * 200_000 + b"]" * 200_000, "not valid JSON.*Download it again"),
    "a huge number": (b'{"model_type": "gemma2", "vocab_size": ' + b"9" * 100_000 + b"}", "not valid JSON.*Download it again"),
    "UTF-16": ('{"model_type": "gemma2"}'.encode("utf-16"), "not valid JSON, which is UTF-8.*Download it again"),
    "Latin-1": (b'{"model_type": "gemm\xe4"}', "not valid JSON, which is UTF-8.*Download it again"),
    "NUL": (b"\0" * 1000, "not valid JSON"),
    "no model": (b'{"a": 1}', "config.json .*neither a 'model_type' .* nor the 'registered_name'.*Download it again"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_json_object(folder, case):
    content, message = TEXTS[case]
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder, message)


def test_a_byte_order_mark_is_read_over(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert find_source("it", str(folder)).config.num_layers == 2


def test_no_json_of_many_gigabytes_is_read(folder):
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 40)
    refused(folder, "config.json has 1099511627776 bytes; no JSON file of a checkpoint is that large")


# Vocabularies -----------------------------------------------------------------------------------------------------------

VOCABULARIES = {
    "empty": (b"", r"tokenizer.model is not a SentencePiece model \(it is empty\). Download it again"),
    "other bytes": (b"\x89PNG" * 1000, r"tokenizer.model is not a SentencePiece model .*Download it again"),
    "cut off": (train_vocabulary()[:9001], r"tokenizer.model is not a SentencePiece model .*Download it again"),
    "twins that are not UTF-8": (
        train_vocabulary().replace(b"<unused38>", b"\xea" * 10).replace(b"<unused39>", b"\xea" * 10),
        "tokenizer.model is not a SentencePiece model",
    ),
    "not Gemma's": (train_vocabulary(without="<end_of_turn>"), "tokenizer of .*lacks the piece `<end_of_turn>`"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_vocabularies_that_are_none(folder, case):
    content, message = VOCABULARIES[case]
    (folder / "tokenizer.model").write_bytes(content)
    refused(folder, message, load=Gemma2Tokenizer.from_preset)


@pytest.mark.parametrize("name", ["keras_gemma2", "keras_hub"])
def test_vocabularies_of_presets(seeds, tmp_path, name):
    folder = shutil.copytree(seeds(name), tmp_path / "model")
    (folder / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(b"\x89PNG" * 1000)
    refused(folder, "vocabulary.spm is not a SentencePiece model .*Download it again", load=Gemma2Tokenizer.from_preset)


# Pickles that unfold ----------------------------------------------------------------------------------------------------


def unfolding(steps):
    """A dict whose key is a tuple of two tuples of two tuples ...: 2 ** steps objects to hash, and none of them is code."""
    doubled = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(steps))
    return b"\x80\x02)q\x00" + doubled + b"}h" + bytes([steps]) + b"K\x01s."


def as_zip(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", data)


def as_old_file(path, content):
    numbers = [pickle.dumps(n, 2) for n in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(numbers) + content + pickle.dumps([], 2))


@pytest.mark.parametrize("write", [as_zip, as_old_file])
@pytest.mark.parametrize("steps, message", [(2, "named tensors only|Missing"), (60, "unfolds to far more objects .*Download")])
def test_pickles_that_would_take_years_to_load(folder, write, steps, message):
    (folder / WEIGHTS).unlink()
    write(folder / "model.ckpt", unfolding(steps))
    refused(folder, message)


# What a preset's files may name ------------------------------------------------------------------------------------------

PLANTED = {
    "a function": {"module": "os", "class_name": "system", "registered_name": None, "config": {"command": "touch {mark}"}},
    "a lambda": {
        "module": "keras.layers",
        "class_name": "Lambda",
        "registered_name": "x>Y",
        "config": {"function": {"class_name": "__lambda__", "config": {"code": "AAAA", "defaults": None, "closure": None}}},
    },
}


@pytest.mark.parametrize("cls", [Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer])
@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor.json", "task.json", "metadata.json"])
@pytest.mark.parametrize("planted", PLANTED)
def test_classes_that_a_preset_names_are_not_run(seeds, tmp_path, cls, file, planted):
    folder, mark = shutil.copytree(seeds("keras_gemma2"), tmp_path / "model"), tmp_path / "mark"
    (folder / file).write_text(json.dumps(PLANTED[planted]).replace("{mark}", str(mark)))
    try:
        loaded = cls.from_preset(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(loaded, cls)
    assert not mark.exists()


@pytest.mark.parametrize("custom", [False, True])
def test_a_vocabulary_outside_of_the_preset_is_not_read(seeds, tmp_path, custom):
    folder = shutil.copytree(seeds("keras_gemma2"), tmp_path / "model")
    (tmp_path / "outside.spm").write_bytes(train_vocabulary().replace(b"<unused38>", b"<outside_>"))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["config"]["proto"] = str(tmp_path / "outside.spm")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    if custom:
        edit(folder / "preprocessor.json", registered_name="x>Y")
        refused(folder, "of a class that cannot be loaded", load=Gemma2Tokenizer.from_preset)
    else:
        assert "<unused38>" in Gemma2Tokenizer.from_preset(folder).get_vocabulary()


# Tokens of a fine-tune --------------------------------------------------------------------------------------------------

TOKENS = {
    "added_tokens.json": [
        ({"<x>": "600"}, "'<x>' must name added tokens"),
        ({"<x>": -1}, "'<x>' must name added tokens"),
        ({"<x>": True}, "'<x>' must name added tokens"),
        ({"": 600}, "'' must name added tokens"),
        ({"\ud800": 600}, "must name added tokens"),
        ({"a\0b": 600}, "must name added tokens"),
        ({"<x>": 600, "<y>": 600}, "the id 600 to '<y>'; '<x>' has it already"),
        ({"<x>": 1_000_000}, "'<x>' has the id 1000000, far beyond the 600 pieces"),
    ],
    "tokenizer_config.json": [
        ({"added_tokens_decoder": []}, "'added_tokens_decoder' must name"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "'added_tokens_decoder' must name"),
        ({"added_tokens_decoder": {"600": {}}}, "'added_tokens_decoder' must name"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "<x>"}}}, "'added_tokens_decoder' must name"),
    ],
    "tokenizer.json": [
        ({"model": {}, "added_tokens": 5}, "'added_tokens' must name"),
        ({"added_tokens": [5]}, "'added_tokens' must name"),
        ({"added_tokens": [{"id": 600}]}, "'added_tokens' must name"),
    ],
}


@pytest.mark.parametrize("name, values, message", [(name, *case) for name, cases in TOKENS.items() for case in cases])
def test_malformed_added_tokens_are_refused(folder, name, values, message):
    edit(folder / "config.json", vocab_size=2_000_000)
    (folder / name).write_text(json.dumps(values))
    refused(folder, message, load=Gemma2Tokenizer.from_preset)


# What people have instead -----------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4241003\n"


@pytest.mark.parametrize(
    "seed, name",
    [
        ("hugging_face", WEIGHTS),
        ("hugging_face", "config.json"),
        ("hugging_face", "tokenizer.model"),
        ("hugging_face sharded", INDEX),
        ("tokenizer.json", "tokenizer.json"),
        ("keras_gemma2", "model.weights.h5"),
        ("keras_gemma2", "assets/tokenizer/vocabulary.spm"),
        ("gemma_pytorch", "model.ckpt"),
        ("gguf f32", "model.gguf"),
    ],
)
def test_pointers_of_git_lfs_are_called_that(seeds, tmp_path, seed, name):
    folder = shutil.copytree(seeds(seed), tmp_path / "model")
    (folder / name).write_text(POINTER)
    message = f"{os.path.basename(name)} is a git-lfs pointer, not the file itself: run `git lfs pull`.*`hf download`"
    refused(folder, message)
    if name.endswith((".gguf", ".ckpt", ".safetensors")):
        refused(folder / name, message)


@pytest.mark.parametrize("config", [True, False])
def test_adapters_are_called_that(folder, config):
    shutil.move(folder / WEIGHTS, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-2-2b"}))
    (folder / "training_args.bin").write_bytes(b"x")
    if not config:
        (folder / "config.json").unlink()
    refused(folder, "is a LoRA adapter of 'google/gemma-2-2b', not a model: load the base model")
    if config:  # merged, with the adapter left lying beside
        shutil.move(folder / "adapter_model.safetensors", folder / WEIGHTS)
        Gemma2Backbone.from_preset(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantized_folders_are_called_that(folder, method):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, f"config.json: `quantization_config`.*quant_method='{method}'.*Take the unquantized model")


UNFINISHED = ["model.safetensors.incomplete", ".cache/huggingface/download/x.incomplete", "a.part", "b.crdownload"]


@pytest.mark.parametrize("name", UNFINISHED)
def test_downloads_that_are_not_complete_are_called_that(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, f"No {WEIGHTS} .*The download is not complete: '{name}' is there", MissingFileError)


def test_other_formats_downloads_that_are_not_complete(seeds, sharded, tmp_path):
    preset = shutil.copytree(seeds("keras_gemma2"), tmp_path / "preset")
    (preset / "model.weights.h5").rename(preset / "model.weights.h5.part")
    refused(preset, "The download is not complete: 'model.weights.h5.part' is there", MissingFileError)
    shard = next(sharded.glob("model-*.safetensors"))
    shard.rename(f"{shard}.incomplete")
    refused(sharded, f"names the file '{shard.name}'.*The download is not complete", MissingFileError)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.model"])
def test_one_file_of_a_folder(folder, name):
    assert "archive" not in refused(folder / name, f"{name}' is one of several.*pass its folder, '{folder}'")


@pytest.mark.parametrize("name", ["model.keras", "model.zip", "model.tar", "model.tar.gz"])
def test_archives(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, "is no checkpoint.*Unpack an archive first and pass its folder")


def test_other_heads_are_called_by_name(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file({**tensors, "score.weight": np.ones((2, 256), "float32")}, folder / WEIGHTS)
    refused(folder, r"Unknown: \['score.weight'\] \(1 in all\)")
    edit(folder / "config.json", architectures=["Gemma2ForSequenceClassification"])
    refused(folder, r"is no causal language model: .*Gemma2ForSequenceClassification.*\['score.weight'\]")


# Files ------------------------------------------------------------------------------------------------------------------


def test_folders_that_hold_nothing(tmp_path):
    refused(tmp_path, r"is no preset: it has no config.json .*It holds: \[\]. Pass the folder")
    (tmp_path / "readme.txt").write_text("x")
    refused(tmp_path, r"It holds: \['readme.txt'\]")
    text = refused(tmp_path / "readme.txt", r"is no checkpoint that this package reads.*\.gguf, \.ckpt, \.pt, \.pth, \.bin")
    assert "archive" not in text
    refused(tmp_path / "nothing", "[Nn]o folder or file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize("name, message", [("config.json", "is no preset"), (WEIGHTS, f"No {WEIGHTS}.*Download")])
def test_pipes_and_links_in_circles_do_not_hang(folder, name, message):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, message)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, message)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS, "tokenizer.model", "."])
def test_files_that_may_not_be_read_are_named(folder, name):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with unprivileged() as parent:
        copy = parent / "model"
        copy.mkdir()
        for file, content in files.items():
            (copy / file).write_bytes(content)
        os.chmod(copy / name, 0)
        load = Gemma2Tokenizer.from_preset if name == "tokenizer.model" else Gemma2Backbone.from_preset
        text = refused(copy, "Permission denied", load=load)
        assert str(copy / name) in text
        os.chmod(copy / name, 0o755)


def test_messages_are_of_bounded_length():
    assert len(str(CheckpointError("x" * 10**6 + " mend"))) < LONGEST_MESSAGE + 10
    assert str(CheckpointError("x" * 10**6 + " mend")).endswith(" mend") and str(CheckpointError("short")) == "short"


# Fuzzing ----------------------------------------------------------------------------------------------------------------


def test_mutated_checkpoints_are_read_or_refused(seeds, tmp_path):
    """In a child process, with limits on time and memory; `python tests/fuzz.py` runs more."""
    first = 10_000 * BACKENDS.index(keras.backend.backend())  # no backend is used; so each one's turn tries other files
    count = int(os.environ.get("KERAS_GEMMA2_FUZZ", 25))
    for name, outcomes in campaign({name: seeds(name) for name in FORMATS}, first, count, tmp_path).items():
        assert set(outcomes) <= {"read", "refused"}, (name, {key: value[:3] for key, value in outcomes.items()})
        assert len(outcomes) == 2 and sum(map(len, outcomes.values())) == count, name
