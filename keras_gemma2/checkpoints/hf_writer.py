"""Writing Hugging Face folders: what transformers, vLLM, TGI and llama.cpp's converter read.

Layout: https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.save_pretrained
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from keras_gemma2.checkpoints.hf import CHAT_TEMPLATE_FILE, GENERATION_FILE, INDEX_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from keras_gemma2.checkpoints.hf_config import config_to_hugging_face
from keras_gemma2.checkpoints.source import CONFIG_FILE, HUGGING_FACE, TOKENIZER_JSON_FILE
from keras_gemma2.checkpoints.tokenizer_json import TURNS, to_tokenizer_json
from keras_gemma2.errors import CheckpointError

if TYPE_CHECKING:
    from keras_gemma2.checkpoints.writing import OutgoingWeights

TURN_END = "<end_of_turn>"
GEMMA_IDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, TURN_END: 107}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # decimal, as huggingface_hub counts
NO_LIMIT = 10**9  # tokens; how transformers says that a tokenizer itself has no longest text

# Gemma's chat format: one <bos>, roles that alternate, what an assistant says under "model", a system's text in front of the
# first user turn.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set turns = messages -%}
{%- set preface = '' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set preface = messages[0]['content'] | trim -%}
    {%- set turns = messages[1:] -%}
    {%- if not turns -%}
        {{- raise_exception('A system message must be followed by one of the user.') -}}
    {%- endif -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {%- if role != ('model' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('Roles must alternate user, model, user, ... beginning with user; got ' ~ turn['role']) -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ role ~ '\\n' -}}
    {%- if loop.first and preface -%}
        {{- preface ~ '\\n\\n' -}}
    {%- endif -%}
    {{- turn['content'] | trim ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def write_folder(
    folder: str,
    weights: OutgoingWeights,
    proto: bytes | None = None,
    stop_token_ids: tuple[int, ...] = (),
    max_shard_size: str | int = "5GB",
    progress: Callable[[int], Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a causal language model, tensor by tensor.

    Args:
        folder: an empty folder.
        weights: all weights, and what to store them in. The tied output projection is not written twice.
        proto: the serialized SentencePiece model; None writes a model without a tokenizer.
        stop_token_ids: where generation stops besides the tokenizer's own stop tokens.
        max_shard_size: largest size of one file, as bytes or a text such as "5GB" (decimal); a larger tensor has its own.
        progress: called with the number of bytes just written.
        extra: as `hf.extra_settings` returns it: `chat_template`, used in place of Gemma's, and `generation_config`, settings
            to write beside the ids of tokens.

    Raises:
        ValueError: for a `max_shard_size` that is no size.
        CheckpointError: if a weight does not fit the dtype's range.

    Example:
        >>> with open_weights(source) as entries:
        ...     write_folder("out", outgoing_from_entries(entries, source.config, "bfloat16"), vocabulary(source))
    """
    _write_weights(folder, weights, parse_size(max_shard_size), progress)
    ids = token_ids(proto)
    config = config_to_hugging_face(weights.config, weights.load_dtype)
    config.update({f"{name}_token_id": ids[f"<{name}>"] for name in ("pad", "eos", "bos")})
    _write_json(os.path.join(folder, CONFIG_FILE), config)
    stop = dict.fromkeys((ids["<eos>"], ids[TURN_END], *stop_token_ids))
    stop = [i for i in stop if i is not None and i < weights.config.vocabulary_size]
    extra = extra or {}
    generation = {
        **extra.get("generation_config", {}),
        "bos_token_id": ids["<bos>"],
        "eos_token_id": stop,
        "pad_token_id": ids["<pad>"],
    }
    _write_json(os.path.join(folder, GENERATION_FILE), generation)
    if proto is not None:
        write_tokenizer(folder, proto, extra.get("chat_template", CHAT_TEMPLATE))


def write_tokenizer(folder: str, proto: bytes, chat_template: str = CHAT_TEMPLATE) -> None:
    """Writes the files that `AutoTokenizer` reads: the vocabulary in both forms, special tokens and the chat template.

    Args:
        folder: where to.
        proto: the serialized SentencePiece model. If it is not of Gemma's kind, it is written without `tokenizer.json`, and
            a warning says so.
        chat_template: in Jinja.
    """
    with open(os.path.join(folder, TOKENIZER_FILE), "wb") as file:
        file.write(proto)
    try:
        values = to_tokenizer_json(proto)
    except CheckpointError as error:
        warnings.warn(f"No tokenizer.json is written: {error}", stacklevel=2)
        values = {"added_tokens": []}
    else:
        _write_json(os.path.join(folder, TOKENIZER_JSON_FILE), values, indent=None)
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    turns = {"additional_special_tokens": list(TURNS)}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(t["id"]): {name: t[name] for name in flags} for t in values["added_tokens"]},
        **special,
        **turns,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }
    _write_json(os.path.join(folder, "tokenizer_config.json"), config)
    _write_json(os.path.join(folder, "special_tokens_map.json"), {**special, **turns})
    with open(os.path.join(folder, CHAT_TEMPLATE_FILE), "w", encoding="utf-8") as file:
        file.write(chat_template)


def parse_size(size: str | int) -> int:
    """Bytes of a size such as "5GB", "200MB" or 5000000000.

    Raises:
        ValueError: for anything else, and for less than one byte.
    """
    bytes_ = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", size, re.IGNORECASE)):
        bytes_ = round(float(match[1]) * UNITS[(match[2] or "B").upper()])
    if bytes_ < 1:
        raise ValueError(f"`max_shard_size` must be bytes as an integer, or a text such as '5GB' or '200MB'. Received: {size!r}.")
    return bytes_


def token_ids(proto: bytes | None) -> dict[str, int | None]:
    """The ids of the pieces that configs name, None for one that is missing; Gemma's own without a vocabulary."""
    if proto is None:
        return dict(GEMMA_IDS)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    found = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    return {piece: found.get(piece) for piece in GEMMA_IDS}


def _shards(weights: OutgoingWeights, limit: int) -> Iterator[dict[str, str]]:
    """Names of tensors and our paths, file by file."""
    from keras_gemma2.checkpoints.weight_map import rows_for

    shapes, held = weights.shapes, 0
    shard: dict[str, str] = {}
    for path, cell in rows_for(weights.config, HUGGING_FACE):
        size = math.prod(shapes[path]) * weights.dtype_of(path).itemsize
        if shard and held + size > limit:
            yield shard
            shard, held = {}, 0
        shard[cell.name] = path
        held += size
    yield shard


def _write_weights(folder: str, weights: OutgoingWeights, limit: int, progress: Callable[[int], Any] | None) -> None:
    from keras_gemma2.checkpoints.safetensors_file import write_safetensors

    shards = list(_shards(weights, limit))
    count = len(shards)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    shapes = weights.shapes
    for name, shard in zip(names, shards):
        tensors = {key: (shapes[path], weights.dtype_of(path), weights.blocks(path)) for key, path in shard.items()}
        write_safetensors(os.path.join(folder, name), tensors, progress)
    if count > 1:
        metadata = {"total_parameters": weights.config.parameter_count(), "total_size": weights.nbytes}
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        _write_json(os.path.join(folder, INDEX_FILE), {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _write_json(path: str, values: dict[str, Any], indent: int | None = 2) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=indent, ensure_ascii=False)
        file.write("\n")


# From a model -----------------------------------------------------------------------------------------------------------


def export_model(
    backbone: Any,
    tokenizer: Any,
    target: str | os.PathLike[str],
    dtype: str | None,
    max_shard_size: str | int,
    config_dtype: str | None,
    owned: tuple[str, ...],
) -> None:
    """Writes a backbone, and a tokenizer if there is one, in one step. Arguments as `export_to_transformers` takes them.

    Args:
        owned: which files of an older checkpoint in the folder are dropped, as `staging.replacing_folder` takes them.
    """
    from keras_gemma2.checkpoints.writing import outgoing_from_backbone, stored
    from keras_gemma2.staging import replacing_folder

    parse_size(max_shard_size)
    weights = outgoing_from_backbone(backbone, dtype)
    if config_dtype is not None:
        weights = dataclasses.replace(weights, policy=stored(config_dtype, "config_dtype").name)
    proto, stop = (None, ()) if tokenizer is None else (tokenizer.proto, tokenizer.stop_token_ids)
    with replacing_folder(target, weights.nbytes + _tokenizer_bytes(proto), owned) as folder:
        write_folder(folder, weights, proto, stop, max_shard_size)


def export_tokenizer(tokenizer: Any, target: str | os.PathLike[str], owned: tuple[str, ...]) -> None:
    """Writes a tokenizer alone; a model in the same folder stays."""
    from keras_gemma2.staging import replacing_folder

    if tokenizer.proto is None:
        raise ValueError("The tokenizer has no vocabulary yet; pass `proto=` to it, or call its `load_assets`.")
    with replacing_folder(target, _tokenizer_bytes(tokenizer.proto), owned) as folder:
        write_tokenizer(folder, tokenizer.proto)


def _tokenizer_bytes(proto: bytes | None) -> int:
    return 6 * len(proto or b"")  # Gemma's tokenizer.json is 4 times its tokenizer.model
