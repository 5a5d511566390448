"""GGUF files: every type, the vocabulary from metadata, split files, and headers that lie.

Files are written by the `gguf` package; weights are compared with its dequantization and with formulas written out here,
logits with transformers.
"""

import itertools
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
from contextlib import ExitStack
from pathlib import Path

import gguf
import keras
import numpy as np
import pytest
import sentencepiece
from gguf_folder import CAN_QUANTIZE, add_tensor, random_blocks, write_gguf
from oracle import hugging_face_folder, hugging_face_logits
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer import GOLDEN
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints import layout, reading
from keras_gemma2.checkpoints.gguf import open_tensors, read_source, vocabulary
from keras_gemma2.checkpoints.gguf_file import open_tensors_of
from keras_gemma2.checkpoints.gguf_header import read_header
from keras_gemma2.checkpoints.weight_map import rows_for
from keras_gemma2.errors import CheckpointError, MissingFileError

TOLERANCE = 2e-5  # as in test_parity
VOCABULARY_SIZE = 600
IDS = np.random.default_rng(1).integers(0, VOCABULARY_SIZE, (2, 13))
# Rows of whole blocks of 256 elements, as k-quants need, and still no two sizes alike.
BLOCKY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "head_dim": 128, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")
        warnings.filterwarnings("ignore", message="Gemma 2's activations")
        yield


def model_folder(**overrides):
    """A Hugging Face folder whose query scalar is head_dim, which is all that GGUF can say; and its model."""
    overrides = {"vocab_size": VOCABULARY_SIZE, "query_pre_attn_scalar": overrides.get("head_dim", 16), **overrides}
    folder, model = hugging_face_folder(**overrides)
    Path(folder, "tokenizer.model").write_bytes(train_vocabulary())
    return folder, model


@pytest.fixture
def path(tmp_path):
    """A float32 file with a vocabulary, to break."""
    write_gguf(model_folder()[0], tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def logits(lm):
    return keras.ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def read_everything(path):
    """What loading does, without a model: the config, every tensor, the vocabulary."""
    source = read_source("it", str(path))
    with ExitStack() as stack:
        tensors, _ = open_tensors(source, source.config, stack)
        for tensor in tensors.values():
            tensor[:]
    vocabulary(source)
    return source


# Weights ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CAN_QUANTIZE, "Q4_K", "Q6_K"])
def test_every_type_equals_transformers_with_the_same_weights(tmp_path, kind):
    import torch
    import transformers

    plain = kind in ("F32", "F16", "BF16")
    folder, model = model_folder(**({} if plain else BLOCKY))
    stored = write_gguf(folder, tmp_path / "model.gguf", kind)
    lm = Gemma2CausalLM.from_preset(tmp_path / "model.gguf", dtype="float32")
    names = {name: cell.name for name, cell in rows_for(lm.backbone.config, "hugging_face")}
    for name, variable in lm.backbone.named_weights().items():  # not a bit is lost, not even of the norms
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), stored[names[name]], name)
    peer = transformers.Gemma2ForCausalLM(model.config).eval()
    peer.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in stored.items()}, strict=False)
    expected = hugging_face_logits(peer, IDS)
    assert np.abs(logits(lm) - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize(
    "kind, expected", [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_K", "bfloat16")]
)
def test_default_dtype(tmp_path, kind, expected):
    """That of the matrices; norms are float32 in every one of these files."""
    write_gguf(model_folder(**BLOCKY)[0], tmp_path / "model.gguf", kind)
    backbone = Gemma2Backbone.from_preset(tmp_path / "model.gguf")
    assert backbone.dtype_policy.name == expected and {v.dtype for v in backbone.variables} == {expected}


def halves(raw):
    return raw.copy().view(np.float16).astype(np.float64)


def dequantized_q8_0(block):
    return halves(block[:2]) * block[2:].view(np.int8)


def dequantized_q4_0(block):
    return halves(block[:2]) * (np.concatenate([block[2:] & 15, block[2:] >> 4]).astype(np.float64) - 8)


def dequantized_q4_k(block):
    """Eight groups of 32: a 6-bit scale and a 6-bit minimum each, packed in 12 bytes; then nibbles."""
    d, d_min = halves(block[:4])
    packed, codes, groups = block[4:16].astype(int), block[16:], []
    for j in range(8):
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            low = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        quarter = codes[32 * (j // 2) :][:32].astype(int)
        groups.append(d * scale * (quarter >> 4 if j % 2 else quarter & 15) - d_min * low)
    return np.concatenate(groups)


def dequantized_q6_k(block):
    """Two halves of 128: four low bits of a code in `low`, two high bits in `high`, a signed scale for every 16."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8)
    values = np.empty(256)
    for half, quarter, i in itertools.product(range(2), range(4), range(32)):
        byte = low[64 * half + 32 * (quarter % 2) + i]
        code = (byte >> 4 if quarter > 1 else byte & 15) | (high[32 * half + i] >> 2 * quarter & 3) << 4
        values[128 * half + 32 * quarter + i] = (code - 32) * scales[8 * half + 2 * quarter + i // 16]
    return values * halves(block[208:])


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "kind, formula",
    [("Q8_0", dequantized_q8_0), ("Q4_0", dequantized_q4_0), ("Q4_K", dequantized_q4_k), ("Q6_K", dequantized_q6_k)],
)
def test_dequantization_follows_ggmls_block_layouts(tmp_path, kind, formula):
    """In float64, block by block, from the structs of ggml-common.h."""
    draw, rows = np.random.default_rng(5), None
    write_gguf(model_folder(**BLOCKY)[0], tmp_path / "model.gguf", kind)
    if kind in CAN_QUANTIZE:
        rows = gguf.quants.quantize(draw.normal(size=(7, 512)).astype("float32"), gguf.GGMLQuantizationType[kind])
    else:
        rows = random_blocks((7, 512), kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "gemma2")
    writer.add_tensor("x", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    expected = np.stack([np.concatenate([formula(block) for block in row.reshape(-1, size)]) for row in rows])
    with ExitStack() as stack:
        tensor = open_tensors_of(read_header(str(tmp_path / "one.gguf")), stack)["x"]
        assert tensor.shape == expected.shape and tensor.dtype == np.float32
        # float32 rounds the product of scales, that with the code, and the difference: three half units of 2**-23.
        np.testing.assert_allclose(tensor[:], expected, rtol=2**-21, atol=2**-21 * np.abs(expected).max())
        np.testing.assert_array_equal(tensor[2:5], tensor[:][2:5])
        np.testing.assert_array_equal(tensor[1:6, 3:300], tensor[:][1:6, 3:300])


def test_rows_are_read_in_blocks(tmp_path, monkeypatch):
    write_gguf(model_folder(**BLOCKY)[0], tmp_path / "model.gguf", "Q8_0")
    whole = Gemma2Backbone.from_preset(tmp_path / "model.gguf", dtype="float32").get_weights()
    monkeypatch.setattr(layout, "ELEMENTS_A_BLOCK", 1000)  # three rows, which is no divisor of 600
    parts = Gemma2Backbone.from_preset(tmp_path / "model.gguf", dtype="float32").get_weights()
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


# Metadata ---------------------------------------------------------------------------------------------------------------


def test_config_equals_that_of_the_folder(path):
    ours, theirs = read_source("it", str(path)).config, reading.find_source("it", model_folder()[0]).config
    assert ours == theirs  # epsilon 1e-3 and not 0.0010000000474974513


def test_query_scalar_of_the_27b(tmp_path):
    """llama.cpp tells the 27B by its 46 layers and then uses hidden_dim / query heads, in whole numbers."""
    folder, _ = model_folder(num_hidden_layers=46)
    write_gguf(folder, tmp_path / "model.gguf", tokens=None)
    assert read_source("it", str(tmp_path / "model.gguf")).config.query_pre_attn_scalar == 42 // 6


@pytest.mark.parametrize(
    "value, expected",
    [(2, "LGLG"), (3, "LLGL"), (1, "GGGG"), ([True, False, False, True], "LGGL")],
)
def test_sliding_window_pattern(tmp_path, value, expected):
    change = lambda writer: set_value(writer, "gemma2.attention.sliding_window_pattern", value)  # noqa: E731
    write_gguf(model_folder()[0], tmp_path / "model.gguf", change=change)
    config = read_source("it", str(tmp_path / "model.gguf")).config
    assert "".join(kind[0].upper() for kind in config.layer_types) == expected


def test_optional_keys_have_llama_cpps_defaults(tmp_path):
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")

    def remove(writer):
        for key in keys:
            del writer.kv_data[0][f"gemma2.{key}"]
        set_value(writer, "gemma2.rope.scaling.type", "none")

    write_gguf(model_folder()[0], tmp_path / "model.gguf", change=remove)
    config = read_source("it", str(tmp_path / "model.gguf")).config
    assert (config.attention_logit_soft_cap, config.final_logit_soft_cap, config.sliding_window_size) == (50.0, 30.0, 4096)


def test_all_four_classes(path):
    backbone = Gemma2Backbone.from_preset(path)
    assert backbone.dtype_policy.name == "float32"
    empty = Gemma2Backbone.from_preset(path, load_weights=False)
    assert empty.config == backbone.config
    tokenizer = Gemma2Tokenizer.from_preset(path)
    assert tokenizer.stop_token_ids == (1, 107)
    assert Gemma2CausalLMPreprocessor.from_preset(path).sequence_length == 64
    lm = Gemma2CausalLM.from_preset(str(path.parent))  # a folder that holds just this
    assert list(lm.preprocessor.tokenizer("The model")) == list(tokenizer("The model"))
    assert isinstance(lm.generate("The model", max_length=8), str)
    with pytest.warns(UserWarning, match="has no tokenizer"):
        write_gguf(model_folder()[0], path, tokens=None)
        assert Gemma2CausalLM.from_preset(path).preprocessor is None


def test_stop_tokens_from_metadata(tmp_path):
    def change(writer):
        set_value(writer, "tokenizer.ggml.eos_token_id", 55)
        set_value(writer, "tokenizer.ggml.eot_token_id", 0xFFFFFFFF)  # llama.cpp's -1: no such token

    write_gguf(model_folder()[0], tmp_path / "model.gguf", change=change)
    assert read_source("it", str(tmp_path / "model.gguf")).stop_token_ids == (55,)
    assert 55 in Gemma2Tokenizer.from_preset(tmp_path / "model.gguf").stop_token_ids


@pytest.mark.backend_free
def test_reading_the_config_imports_nothing_heavy(path):
    code = (
        "import sys; from keras_gemma2.checkpoints.gguf import read_source; read_source('it', sys.argv[1]);"
        "print(sorted({'numpy', 'gguf', 'keras', 'sentencepiece', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_only_quantized_files_need_the_package(tmp_path, monkeypatch):
    write_gguf(model_folder(**BLOCKY)[0], tmp_path / "q.gguf", "Q8_0")
    write_gguf(model_folder(**BLOCKY)[0], tmp_path / "f.gguf", "BF16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    Gemma2Backbone.from_preset(tmp_path / "f.gguf")
    with pytest.raises(CheckpointError, match="pip install gguf"):
        Gemma2Backbone.from_preset(tmp_path / "q.gguf")


# Vocabulary -------------------------------------------------------------------------------------------------------------


def pieces(proto):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]


def assert_same_vocabulary(path, proto, texts):
    found = vocabulary(read_source("it", str(path)))
    assert pieces(found) == pieces(proto)
    ours = sentencepiece.SentencePieceProcessor(model_proto=found)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    return ours


@pytest.mark.backend_free
@pytest.mark.parametrize("tokens", ["spm", "tokenizer_config", "tokenizer_model"])
def test_vocabulary_gives_the_ids_of_the_original(tmp_path, tokens):
    write_gguf(model_folder()[0], tmp_path / "model.gguf", tokens=tokens)
    texts = [*HARD_TEXTS, *random_texts(seed=3, count=500)]
    rebuilt = assert_same_vocabulary(tmp_path / "model.gguf", train_vocabulary(), texts)
    assert rebuilt.encode("<start_of_turn>\n<end_of_turn>") == [106, 108, 107]
    assert len(rebuilt.encode("<bos>")) > 1  # spelled out, it is text and not the token
    assert rebuilt.encode("\n\n\n    ") == [110, 141]


@pytest.mark.backend_free
def test_the_real_vocabulary(tmp_path):
    original = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not original:
        pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's `tokenizer.model`.")
    proto = Path(original).read_bytes()
    folder, _ = hugging_face_folder(vocab_size=256000, hidden_size=6, num_hidden_layers=1)
    Path(folder, "tokenizer.model").write_bytes(proto)
    write_gguf(folder, tmp_path / "model.gguf", "F16", "tokenizer_config")
    long = "".join(Path(module).read_text(encoding="utf-8") for module in (layout.__file__, reading.__file__, __file__))
    texts = [*HARD_TEXTS, *random_texts(seed=4, count=300), long, " ".join(random_texts(seed=5, count=1000))]
    rebuilt = assert_same_vocabulary(tmp_path / "model.gguf", proto, texts)
    for text, ids in GOLDEN:
        assert rebuilt.encode(text) == ids


def test_rows_beyond_the_vocabulary_are_unused(tmp_path):
    folder, _ = model_folder(vocab_size=610)
    write_gguf(folder, tmp_path / "model.gguf")
    proto = vocabulary(read_source("it", str(tmp_path / "model.gguf")))
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert processor.get_piece_size() == 610 and processor.is_unused(605)
    texts = [*HARD_TEXTS, "[PAD605]"]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train_vocabulary())
    assert [processor.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model", "gpt2", "tokenizer.ggml.model.*'gpt2'"),
        ("scores", [0.0] * 599, "one length"),
        ("scores", [float("nan")] * 600, "the score nan"),
        ("scores", ["a"] * 600, "list of numbers"),
        ("token_type", [77] * 600, "no vocabulary"),
        ("token_type", [1] * 600, "no vocabulary"),  # byte pieces are missing
        ("tokens", ["a"] * 600, "no vocabulary"),
        ("tokens", list(range(600)), "list of strings"),
        ("tokens", [b"\xff"] * 600, "no vocabulary"),
        ("tokens", "a", "must be lists"),
    ],
)
def test_broken_vocabularies_are_refused(tmp_path, key, value, message):
    write_gguf(model_folder()[0], tmp_path / "x.gguf", change=lambda writer: set_value(writer, f"tokenizer.ggml.{key}", value))
    with pytest.raises(CheckpointError, match=message):
        Gemma2Tokenizer.from_preset(tmp_path / "x.gguf")


def test_more_tokens_than_rows_are_refused(tmp_path):
    folder = shutil.copytree(model_folder(vocab_size=590)[0], tmp_path / "folder")
    write_gguf(folder, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="600 tokens.*590 rows"):
        Gemma2Tokenizer.from_preset(tmp_path / "x.gguf")


# Files ------------------------------------------------------------------------------------------------------------------


def test_split_files(tmp_path):
    folder, model = model_folder()
    write_gguf(folder, tmp_path / "model.gguf", split_max_tensors=20)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    expected = hugging_face_logits(model, IDS)
    for where in (tmp_path, parts[0], parts[2]):
        assert np.abs(logits(Gemma2CausalLM.from_preset(where)) - expected).max() <= TOLERANCE * np.ptp(expected)
    shutil.copy(parts[1], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts.*llama-gguf-split --merge"):
        Gemma2Backbone.from_preset(tmp_path / "alone.gguf")
    shutil.copy(parts[0], parts[1])  # every tensor of part 1 once more
    with pytest.raises(CheckpointError, match="token_embd.*twice in the parts"):
        Gemma2Backbone.from_preset(parts[0])
    parts[1].unlink()
    with pytest.raises(MissingFileError, match="model-00002-of-00003.gguf is not there"):
        Gemma2Backbone.from_preset(parts[0])


def test_folders_and_names(path):
    shutil.copy(path, path.with_name("other.GGUF"))
    with pytest.raises(CheckpointError, match="several GGUF models.*model.gguf.*other.GGUF"):
        Gemma2Backbone.from_preset(path.parent)
    path.with_name("other.GGUF").unlink()
    os.rename(path, path.with_name("weights"))  # recognized by content
    assert read_source("it", str(path.with_name("weights"))) is not None
    assert read_source("it", str(path.parent)) is None
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="does not start with 'GGUF'"):
        Gemma2Backbone.from_preset(path)
    (path.parent / "config.json").write_text('{"model_type": "gemma2"}')
    assert read_source("it", str(path.parent)) is None  # a Hugging Face folder that has a GGUF file beside


def set_value(writer, key, value):
    kind = gguf.GGUFValueType.get_type(value)
    if isinstance(value, int) and not isinstance(value, bool):
        kind = gguf.GGUFValueType.UINT64 if value >= 0 else gguf.GGUFValueType.INT64
    sub_type = None
    writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind, sub_type)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("general.architecture", "gemma3", "architecture is 'gemma3'"),
        ("general.architecture", "gemma", "architecture is 'gemma', not 'gemma2'"),
        ("general.type", "adapter", "general.type is 'adapter'"),
        ("gemma2.block_count", None, "no gemma2.block_count"),
        ("gemma2.block_count", 2**30, "block_count is 1073741824, but the file has only 46 tensors"),
        ("gemma2.block_count", 3, "Unknown: .*blk.3.*11 in all"),
        ("gemma2.block_count", 5, "Missing: .*blk.4.*11 in all"),
        ("gemma2.block_count", 4.0, "`num_layers`.*4.0"),
        ("gemma2.embedding_length", 2**62, "embedding_length must be one number of usual size"),
        ("gemma2.embedding_length", 44, r"\(600, 42\).*\(600, 44\)"),
        ("gemma2.embedding_length", "big", "embedding_length.*'big'"),
        ("gemma2.attention.head_count", 0, "num_query_heads"),
        ("gemma2.attention.head_count", [6, 6, 6, 6], "head_count must be one number"),
        ("gemma2.attention.head_count_kv", -2, "num_key_value_heads=-2"),
        ("gemma2.attention.value_length", 8, "value_length must equal"),
        ("gemma2.attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon.*nan"),
        ("gemma2.attn_logit_softcapping", float("inf"), "softcapping.*inf"),
        ("gemma2.attention.sliding_window_pattern", 0, "sliding_window_pattern.*0"),
        ("gemma2.attention.sliding_window_pattern", [True], "layer_types"),
        ("gemma2.attention.sliding_window_pattern", ["a"], "list of numbers"),
        ("gemma2.rope.scaling.type", "yarn", "'yarn'"),
        ("gemma2.context_length", True, "context_length.*True"),
        ("general.alignment", 0, "general.alignment.*0"),
        ("general.alignment", 12, "general.alignment.*12"),
        ("general.alignment", "a", "general.alignment.*'a'"),
    ],
)
def test_other_models_are_refused(tmp_path, key, value, message):
    def change(writer):
        if value is None:
            del writer.kv_data[0][key]
        else:
            set_value(writer, key, value)

    write_gguf(model_folder()[0], tmp_path / "model.gguf", change=change)
    with pytest.raises(CheckpointError, match=message):
        Gemma2CausalLM.from_preset(tmp_path / "model.gguf")


def test_unknown_tensors_and_types_are_refused(tmp_path):
    extra = np.ones((2, 3), "float32")
    write_gguf(model_folder()[0], tmp_path / "x.gguf", change=lambda writer: add_tensor(writer, "output.weight", extra, "F32"))
    with pytest.raises(CheckpointError, match="Unknown: .'output.weight'"):
        Gemma2Backbone.from_preset(tmp_path / "x.gguf")
    write_gguf(model_folder()[0], tmp_path / "x.gguf", change=lambda writer: writer.add_tensor("x", extra.astype("int32")))
    with pytest.raises(CheckpointError, match="'x'.*type 26.*I32"):
        Gemma2Backbone.from_preset(tmp_path / "x.gguf")


# Headers that lie -------------------------------------------------------------------------------------------------------


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def entry(name="token_embd.weight", dims=(4, 2), kind=0, offset=0, rank=None):
    rank = len(dims) if rank is None else rank
    return text(name) + struct.pack("<I", rank) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def pair(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


U64 = "<Q"
ARCHITECTURE = pair("general.architecture", 8, text("gemma2"))


def lying(values=(ARCHITECTURE,), tensors=(), counts=None, version=3, data=b"\0" * 64):
    tensor_count, value_count = counts or (len(tensors), len(values))
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count) + b"".join(values) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


LIES = {
    "no tensors counted": (lying(counts=(2**60, 1)), "1152921504606846976 tensors"),
    "no values counted": (lying(counts=(0, 2**63)), "metadata values"),
    "one value more": (lying(counts=(0, 6)), "metadata"),
    "version 1": (lying(version=1), "version 1"),
    "version 0": (lying(version=0), "version 0"),
    "big endian": (lying(version=3 << 24), "big-endian"),
    "a long key": (lying([struct.pack(U64, 2**60) + b"a"]), "goes on for 1152921504606846976 bytes"),
    "a longest key": (lying([struct.pack(U64, 2**64 - 1) + b"a"]), "goes on for"),
    "a long text": (lying([pair("a", 8, struct.pack(U64, 2**62))]), "goes on for"),
    "a key that is no text": (lying([pair(b"\xff", 8, text("a"))]), "not UTF-8"),
    "an unknown type": (lying([pair("a", 13, struct.pack(U64, 1))]), "unknown type 13"),
    "nested lists": (lying([pair("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]), "entries of type 9"),
    "deeply nested lists": (lying([pair("a", 9, struct.pack("<IQ", 9, 1) * 5000)]), "entries of type 9"),
    "a list of no type": (lying([pair("a", 9, struct.pack("<IQ", 99, 1))]), "entries of type 99"),
    "a long list": (lying([pair("a", 9, struct.pack("<IQ", 4, 2**62))]), "4611686018427387904 entries"),
    "a long list of texts": (lying([pair("a", 9, struct.pack("<IQ", 8, 2**50))]), "1125899906842624 entries"),
    "a text in a list": (lying([pair("a", 9, struct.pack("<IQQ", 8, 1, 2**61))]), "goes on for"),
    "a key twice": (lying([ARCHITECTURE, ARCHITECTURE]), "'general.architecture' stands twice"),
    "a huge alignment": (lying([pair("general.alignment", 4, struct.pack("<I", 2**31))], [entry()]), "would start"),
    "a tensor twice": (lying(tensors=[entry(), entry(offset=32)]), "'token_embd.weight' stands twice"),
    "no axes": (lying(tensors=[entry(dims=())]), "has 0 axes"),
    "many axes": (lying(tensors=[entry(dims=(1,) * 5)]), "has 5 axes"),
    "all axes": (lying(tensors=[entry(rank=2**32 - 1)]), "has 4294967295 axes"),
    "an empty axis": (lying(tensors=[entry(dims=(0, 2))]), "no elements"),
    "beyond the end": (lying(tensors=[entry(offset=2**62)]), "would start at byte"),
    "at the end": (lying(tensors=[entry(offset=64)]), "would start at byte"),
    "a negative offset": (lying(tensors=[entry(offset=2**64 - 32)]), "would start at byte"),
    "an odd offset": (lying(tensors=[entry(offset=8)]), "would start at byte"),
}
OPENED_LIES = {  # those that show when tensors are opened
    "a huge axis": ([entry(dims=(2**62, 2))], "reaches beyond 'the end"),
    "axes that overflow": ([entry(dims=(2**32, 2**32))], "reaches beyond 'the end"),
    "a long tensor": ([entry(dims=(4, 5))], "reaches beyond 'the end"),
    "over another": ([entry(dims=(4, 4)), entry("b", (2, 2), offset=32)], "'token_embd.weight'.*reaches beyond 'b'"),
    "over the same": ([entry(dims=(2, 2)), entry("b", (2, 2))], "'b'.*reaches beyond|reaches beyond 'token"),
    "an unknown type": ([entry(kind=31)], "the type 31"),
    "a type of 2**32": ([entry(kind=2**32 - 1)], "the type 4294967295"),
    "a part of a block": ([entry(dims=(33, 1), kind=8)], "blocks of 32"),
    "a quantized vector": ([entry(dims=(32,), kind=8)], "blocks of 32"),
}


@pytest.mark.backend_free
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
    content, message = LIES[lie]
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        read_source("it", str(tmp_path / "x.gguf"))
    assert tracemalloc.get_traced_memory()[1] < 500_000 + 4 * len(content)  # the interpreter's own, and the header's
    tracemalloc.stop()


@pytest.mark.backend_free
@pytest.mark.parametrize("lie", OPENED_LIES)
def test_tensors_that_lie_are_refused(tmp_path, lie):
    tensors, message = OPENED_LIES[lie]
    (tmp_path / "x.gguf").write_bytes(lying(tensors=tensors))
    with ExitStack() as stack, pytest.raises(CheckpointError, match=message):
        open_tensors_of(read_header(str(tmp_path / "x.gguf")), stack)


def test_a_header_is_never_longer_than_64_mb(tmp_path):
    with open(tmp_path / "x.gguf", "wb") as file:
        file.write(lying([struct.pack(U64, 2**30) + b"a"]))
        file.truncate(2**31)  # sparse: the file is as long as it says
    with pytest.raises(CheckpointError, match="longer than 67108864 bytes"):
        read_source("it", str(tmp_path / "x.gguf"))


@pytest.mark.backend_free
def test_truncated_files_are_refused(path):
    whole = path.read_bytes()
    end = whole.index(b"output_norm.weight") + 50  # the last tensor's entry
    for length in [*range(4, 600, 7), *range(600, end, 613), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_everything(path)


@pytest.mark.backend_free
def test_flipped_bytes_give_only_checkpoint_errors(path):
    """Any byte of the header may be anything; what still makes a model may load."""
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    draw = np.random.default_rng(11)
    end = bytes(whole).index(b"output_norm.weight") + 50
    outcomes = []
    for _ in range(int(os.environ.get("KERAS_GEMMA2_FUZZ", 300))):
        broken = whole.copy()
        # Half of the places in the metadata's first 900 bytes, which hold the config, half anywhere in the header.
        for place in draw.integers(4, draw.choice([900, end]), draw.integers(1, 4)):
            broken[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.integers(256)])
        path.write_bytes(broken.tobytes())
        try:
            read_everything(path)
            outcomes.append("read")
        except CheckpointError:
            outcomes.append("refused")
    assert {"read", "refused"} == set(outcomes)
