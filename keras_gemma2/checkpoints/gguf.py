"""Reading GGUF files of Gemma 2, the format of llama.cpp: any plain or quantized type that the `gguf` package dequantizes.

A GGUF file does not hold `query_pre_attn_scalar`. This reader takes what llama.cpp takes (`src/models/gemma2.cpp`):
hidden_dim / query heads for 46 layers, which is the 27B, and head_dim for any other number of layers. For a model of
another make, pass `query_pre_attn_scalar=` to `from_preset`.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and `set_gguf_parameters` and `set_vocab` of Gemma2Model
in llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from keras_gemma2.checkpoints.gguf_header import PLAIN_TYPES, Array, Header, TensorInfo, is_gguf, read_header
from keras_gemma2.checkpoints.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, build_model
from keras_gemma2.checkpoints.source import CONFIG_FILE, GGUF, Source, refuse_lfs_pointer
from keras_gemma2.config import GLOBAL, LOCAL, Gemma2Config
from keras_gemma2.errors import CheckpointError, MissingFileError

ARCHITECTURE = "gemma2"
EMBEDDING = "token_embd.weight"
LAYERS_OF_27B = 46
QUANTIZED_DTYPE = "bfloat16"  # what Gemma was trained in; float16 overflows, and float32 is twice the memory for nothing

# Our name, the key below `gemma2.`, and llama.cpp's default; None where it has none either.
_FIELDS = (
    ("num_layers", "block_count", None),
    ("num_query_heads", "attention.head_count", None),
    ("hidden_dim", "embedding_length", None),
    ("intermediate_dim", "feed_forward_length", None),
    ("sliding_window_size", "attention.sliding_window", 4096),
    ("attention_logit_soft_cap", "attn_logit_softcapping", 50.0),
    ("final_logit_soft_cap", "final_logit_softcapping", 30.0),
    ("layer_norm_epsilon", "attention.layer_norm_rms_epsilon", None),
    ("rope_max_wavelength", "rope.freq_base", 10000.0),
    ("max_sequence_length", "context_length", None),
)
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# What these pieces are in Gemma's own vocabulary; every other "control" piece there is a user-defined one.
_FRAME_KINDS = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a GGUF file by its first bytes, or a folder with one GGUF model and no config.json."""
    model = _model_file(path)
    if model is None:
        return None
    headers = _headers(model)
    values = headers[0].values
    _refuse_other_models(model, values)
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    try:
        config = _config(values, tensors)
    except ValueError as error:
        raise CheckpointError(f"{model}: {error}") from error
    plain = {key: value for key, value in values.items() if not isinstance(value, Array)}
    return Source(name, GGUF, config, path, plain, _default_dtype(tensors), _stop_token_ids(values, config))


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor of a file, or of all parts of a split one; quantized ones give float32 when they are sliced."""
    from keras_gemma2.checkpoints.gguf_file import open_tensors_of
    from keras_gemma2.checkpoints.weight_map import rows_for

    tensors: dict[str, Any] = {}
    for header in _headers(_model_file(source.path)):
        for name, tensor in open_tensors_of(header, stack).items():
            if name in tensors:
                raise CheckpointError(f"The tensor {name!r} stands twice in the parts of {source.path}.")
            tensors[name] = tensor
    return tensors, dict(rows_for(config, GGUF))


def vocabulary(source: Source) -> bytes | None:
    """A SentencePiece model made from the file's list of tokens; None if it has no such list.

    Raises:
        CheckpointError: if the tokenizer is not SentencePiece's, or its lists make no vocabulary.
    """
    import sentencepiece

    path = _model_file(source.path)
    values = _headers(path)[0].values
    if "tokenizer.ggml.tokens" not in values:
        return None
    kind = values.get("tokenizer.ggml.model")
    if kind != "llama":  # llama.cpp's name for SentencePiece vocabularies
        raise CheckpointError(f"{path}: tokenizer.ggml.model must be 'llama' for Gemma 2. Received: {kind!r}.")
    try:
        proto = build_model(_pieces(values, source.config.vocabulary_size))
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its tokens make no vocabulary: {error}. Convert the model again.") from error
    return proto


# Files ------------------------------------------------------------------------------------------------------------------


def _model_file(path: str) -> str | None:
    """The GGUF file that a path means; of a split one, the first part."""
    if os.path.isfile(path):
        if is_gguf(path):
            return _part(path, 1)
        if path.lower().endswith(".gguf"):
            refuse_lfs_pointer(path)
            raise CheckpointError(f"{path} is no GGUF file: it does not start with 'GGUF'. Download it again.")
        return None
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, CONFIG_FILE)):
        return None
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(".gguf")]
    except OSError as error:
        raise CheckpointError(f"The folder {path!r} cannot be read: {error}.") from error
    models = sorted({_part(name, 1) for name in names})
    if len(models) > 1:
        raise CheckpointError(f"The folder {path!r} holds several GGUF models: {models[:20]}. Pass the path of one of them.")
    return os.path.join(path, models[0]) if models else None


def _part(path: str, number: int) -> str:
    """The name of another part of the same split file; a file that is not split is its own only part."""
    split = _SPLIT_NAME.fullmatch(path)
    return path if split is None else f"{split['stem']}-{number:05}-of-{split['count']}.gguf"


def _headers(model: str) -> list[Header]:
    """The headers of a file, or of all parts of a split one."""
    split = _SPLIT_NAME.fullmatch(model)
    count = 1 if split is None else int(split["count"])
    headers = []
    for number in range(1, count + 1):
        path = _part(model, number)
        if not os.path.isfile(path):
            raise MissingFileError(f"{path} is not there: the model is split in {count} files. Download them all.")
        headers.append(read_header(path))
        said = headers[-1].values.get("split.count", 1)
        if said != count:
            raise CheckpointError(
                f"{path} says that it is one of {said!r} parts, its name says {count}. Give the parts their names back, or "
                "merge them with `llama-gguf-split --merge`."
            )
    return headers


def _refuse_other_models(path: str, values: Mapping[str, Any]) -> None:
    architecture, kind = values.get("general.architecture"), values.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} is no model: its general.type is {kind!r}. Pass the model's own GGUF file.")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{path} is no Gemma 2 model: its general.architecture is {architecture!r}, not {ARCHITECTURE!r}.")


# Metadata ---------------------------------------------------------------------------------------------------------------


def _config(values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Gemma2Config:
    """The architecture; a ValueError names the key that does not fit."""
    ours = {name: _number(values, key, default) for name, key, default in _FIELDS}
    _refuse_other_rope(values)
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"the file must hold the matrix {EMBEDDING!r}; it has {len(tensors)} tensors without it")
    # Before a config is made, which takes memory for every layer and would take it for a billion as well.
    if ours["num_layers"] > len(tensors):
        raise ValueError(f"gemma2.block_count is {ours['num_layers']}, but the file has only {len(tensors)} tensors")
    heads, hidden = ours["num_query_heads"], ours["hidden_dim"]
    head_dim = _number(values, "attention.key_length", hidden // max(1, heads))
    if _number(values, "attention.value_length", head_dim) != head_dim:
        raise ValueError("gemma2.attention.value_length must equal key_length for Gemma 2")
    for name in ("attention_logit_soft_cap", "final_logit_soft_cap"):
        ours[name] = ours[name] or None  # ggml writes "no cap" as 0
    return Gemma2Config(
        vocabulary_size=embedding.shape[0],
        num_key_value_heads=_number(values, "attention.head_count_kv", heads),
        head_dim=head_dim,
        query_pre_attn_scalar=hidden // max(1, heads) if ours["num_layers"] == LAYERS_OF_27B else head_dim,
        layer_types=_layer_types(values, ours["num_layers"]),
        **ours,
    )


def _number(values: Mapping[str, Any], key: str, default: float | None) -> Any:
    """A number from the metadata; integers stay below 2^31, and float32 gets the shortest decimals that mean the same."""
    value = values.get(f"{ARCHITECTURE}.{key}", default)
    if value is None:
        raise ValueError(f"the metadata has no {ARCHITECTURE}.{key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**31) < value < 2**31:
        raise ValueError(f"{ARCHITECTURE}.{key} must be one number of usual size. Received: {value!r}")
    if isinstance(value, int) or isinstance(default, int) or value != _as_float32(value):
        return value
    return next(short for short in (float(f"{value:.{digits}g}") for digits in range(1, 18)) if _as_float32(short) == value)


def _as_float32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.inf


def _layer_types(values: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """From `sliding_window_pattern`: true for each local layer, or p for "every p-th layer is global". Mostly not there."""
    pattern = values.get(f"{ARCHITECTURE}.attention.sliding_window_pattern")
    if pattern is None:
        return None
    if isinstance(pattern, Array):
        return [LOCAL if local else GLOBAL for local in pattern.numbers()]
    if type(pattern) is not int or pattern < 1:
        raise ValueError(f"gemma2.attention.sliding_window_pattern must be a list or a positive integer. Received: {pattern!r}")
    return [LOCAL if i % pattern < pattern - 1 else GLOBAL for i in range(num_layers)]


def _refuse_other_rope(values: Mapping[str, Any]) -> None:
    kind = values.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(f"gemma2.rope.scaling.type must be 'none' for Gemma 2. Received: {kind!r}")


def _default_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The type most elements of plain matrices are stored in; `QUANTIZED_DTYPE` if any matrix is quantized.

    Norms do not count: converters leave them in float32 whatever the file's type.
    """
    elements: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            name = PLAIN_TYPES.get(tensor.kind, "")
            elements[name] = elements.get(name, 0) + math.prod(tensor.shape)
    return QUANTIZED_DTYPE if "" in elements else max(elements, key=elements.__getitem__)


def _stop_token_ids(values: Mapping[str, Any], config: Gemma2Config) -> tuple[int, ...]:
    """End of text and end of turn; like llama.cpp, ids that no token has are passed over (4294967295 means "none")."""
    ids = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < config.vocabulary_size))


# Vocabulary -------------------------------------------------------------------------------------------------------------


def _pieces(values: Mapping[str, Any], vocabulary_size: int) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of each piece as Gemma's own vocabulary has them.

    llama.cpp's converter changes user-defined pieces. With a `tokenizer_config.json` at hand, it calls some of them
    control pieces (`<start_of_turn>` among them, which text must be able to name) and writes others with spaces instead
    of U+2581. Without one, it calls all of them normal pieces; those are told by their score of +0, which no learned
    piece has: the first of these has -0, the others are below.
    """
    lists = [values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if not all(isinstance(entries, Array) for entries in lists) or len({entries.count for entries in lists}) > 1:
        raise ValueError("tokenizer.ggml.tokens, .scores and .token_type must be lists of one length")
    if lists[0].count > vocabulary_size:
        raise ValueError(f"there are {lists[0].count} tokens, but {EMBEDDING!r} has {vocabulary_size} rows")
    for text, score, kind in zip(lists[0].strings(), lists[1].numbers(), lists[2].numbers()):
        if not math.isfinite(score):
            raise ValueError(f"the token {text!r} has the score {score}")
        unlearned = score == 0 and math.copysign(1.0, score) > 0
        if kind == CONTROL or (kind == NORMAL and unlearned):
            kind = USER_DEFINED
        kind = _FRAME_KINDS.get(text, kind)
        if kind == USER_DEFINED:
            text = text.replace(" ", "\u2581")
        yield text, score if kind in (NORMAL, UNUSED) else 0.0, kind
