"""Reading Hugging Face folders of Gemma 2: `config.json`, safetensors, `tokenizer.model` or `tokenizer.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

from keras_gemma2.checkpoints.added_tokens import TOKENIZER_CONFIG_FILE, with_added_tokens
from keras_gemma2.checkpoints.hf_config import (
    config_from_hugging_face,
    dtype_from_hugging_face,
    is_hugging_face_config,
    stop_token_ids_from_hugging_face,
)
from keras_gemma2.checkpoints.sentencepiece_model import read_model
from keras_gemma2.checkpoints.source import (
    CONFIG_FILE,
    GEMMA_PYTORCH,
    HUGGING_FACE,
    TOKENIZER_JSON_FILE,
    Source,
    file_inside,
    find_file,
    read_json,
    shown,
    unfinished_download,
)
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError, MissingFileError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.model"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
BASE_PREFIX = "model."  # that names lack in a base model, which was saved without its head
READ_CLASSES = ("Gemma2ForCausalLM", "Gemma2Model")
LARGEST_SETTINGS = 1 << 20  # bytes of a chat template or of generation settings


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a folder by the `model_type` in its config.json."""
    config = find_file(path, CONFIG_FILE)
    if config is None:
        return None
    values = read_json(config)
    if not is_hugging_face_config(values):
        return None
    try:
        parsed, dtype = config_from_hugging_face(values), dtype_from_hugging_face(values)
    except ValueError as error:
        raise CheckpointError(f"{config}: {error}") from error
    generation = find_file(path, GENERATION_FILE)
    try:
        stop = stop_token_ids_from_hugging_face(values, {} if generation is None else read_json(generation))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{generation or config}: {error}") from error
    return Source(name, HUGGING_FACE, parsed, path, values, dtype, stop)


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor of a folder's safetensors, one file or several; a duplicate `lm_head.weight` must equal the embedding."""
    from keras_gemma2.checkpoints.weight_map import rows_for

    tensors, cells = _open_files(source.path, stack), dict(rows_for(config, HUGGING_FACE))
    if EMBEDDING not in tensors and EMBEDDING.removeprefix(BASE_PREFIX) in tensors:
        cells = {path: dataclasses.replace(cell, name=cell.name.removeprefix(BASE_PREFIX)) for path, cell in cells.items()}
    elif HEAD in tensors and EMBEDDING in tensors:
        _check_tied_head(tensors, source.path)
        del tensors[HEAD]
    _refuse_other_heads(source, sorted(set(tensors) - {cell.name for cell in cells.values()}))
    return tensors, cells


def vocabulary(source: Source) -> bytes | None:
    """The bytes of tokenizer.model with what its folder adds to it, or of a model made of tokenizer.json.

    transformers 5 saves tokenizer.json alone.
    """
    path = find_file(source.path, TOKENIZER_FILE)
    if path is not None:
        return with_added_tokens(read_model(path), source.path, source.config.vocabulary_size)
    path = find_file(source.path, TOKENIZER_JSON_FILE)
    if path is None:
        return None
    from keras_gemma2.checkpoints.tokenizer_json import from_tokenizer_json

    return from_tokenizer_json(read_json(path), path)


def extra_settings(source: Source) -> dict[str, Any]:
    """What a folder says of chats and of generation that this package's models have no place for, to be written again.

    Args:
        source: of any kind; only folders of transformers' files say something.

    Returns:
        `chat_template`, a Jinja text, and `generation_config`, the settings of that file but ids of tokens; each only if it is
        there. What is no setting, or too large for one, is left out, with a warning.

    Example:
        >>> write_folder("out", weights, proto, extra=extra_settings(source))
    """
    if source.kind not in (HUGGING_FACE, GEMMA_PYTORCH) or not os.path.isdir(source.path or ""):
        return {}
    template, generation = _chat_template(source.path), _generation_settings(source.path)
    return {**({"chat_template": template} if template else {}), **({"generation_config": generation} if generation else {})}


def _chat_template(folder: str) -> str | None:
    path = find_file(folder, CHAT_TEMPLATE_FILE)
    if path is not None and _is_small(path):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            warnings.warn(f"The chat template {path} is left out: {error}.", stacklevel=4)
    path = find_file(folder, TOKENIZER_CONFIG_FILE)
    template = read_json(path).get("chat_template") if path is not None else None
    if not isinstance(template, str) or len(template) > LARGEST_SETTINGS or any("\ud800" <= c <= "\udfff" for c in template):
        return None  # a list of several templates has no one that is the model's
    return template


def _generation_settings(folder: str) -> dict[str, Any]:
    path = find_file(folder, GENERATION_FILE)
    if path is None or not _is_small(path):
        return {}
    return {
        key: value
        for key, value in read_json(path).items()
        if not key.startswith("_") and not key.endswith("_token_id") and key.isascii() and _is_setting(value)
    }


def _is_setting(value: Any) -> bool:
    """Whether something is a number, a text, true, false, null, or a list of those."""
    if isinstance(value, list):
        return all(not isinstance(each, list) and _is_setting(each) for each in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or (isinstance(value, str) and value.isprintable())


def _is_small(path: str) -> bool:
    if os.path.getsize(path) <= LARGEST_SETTINGS:
        return True
    warnings.warn(f"{path} is left out: it is larger than {LARGEST_SETTINGS} bytes.", stacklevel=5)
    return False


def _refuse_other_heads(source: Source, unknown: list[str]) -> None:
    classes = source.values.get("architectures")
    if not unknown or not classes or not isinstance(classes, list) or any(each in READ_CLASSES for each in classes):
        return
    raise CheckpointError(
        f"{source.path} is no causal language model: `architectures` of its {CONFIG_FILE} is {shown(classes)}, and its weights "
        f"hold {unknown[:5]}, which Gemma2ForCausalLM has not. Load the model that it was made of."
    )


def _open_files(folder: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy tensors of every file, by name."""
    from keras_gemma2.checkpoints.safetensors_file import open_safetensors

    tensors: dict[str, Any] = {}
    for path in _weight_files(folder):
        for key, tensor in open_safetensors(path, stack).items():
            if key in tensors:
                raise CheckpointError(f"The tensor {key!r} stands twice in the safetensors of {folder}.")
            tensors[key] = tensor
    return tensors


def _weight_files(folder: str) -> list[str]:
    index = find_file(folder, INDEX_FILE)
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} must hold a `weight_map` from tensors to files. Download it again.")
        return [file_inside(folder, name, index) for name in sorted(set(map(_name, weight_map.values())))]
    single = find_file(folder, WEIGHTS_FILE)
    if single is None:
        raise MissingFileError(
            f"No {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}. Download the weights.{unfinished_download(folder)}"
        )
    return [single]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _check_tied_head(tensors: dict[str, Any], folder: str) -> None:
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if len(head.shape) != 2 or tuple(head.shape) != tuple(embedding.shape) or not _equal(head, embedding):
        raise CheckpointError(
            f"{HEAD!r} of {folder} differs from the embedding. Gemma 2 ties the two; a model trained with an untied head "
            "cannot be loaded."
        )


def _equal(head: Any, embedding: Any) -> bool:
    import numpy as np

    return all(np.array_equal(a, b) for a, b in zip(_rows(head), _rows(embedding)))


def _rows(tensor: Any) -> Iterator[Any]:
    from keras_gemma2.checkpoints.layout import layout

    return layout("a b -> a b").row_blocks(tensor)
