"""Reading Hugging Face folders of Gemma 2: `config.json`, safetensors, `tokenizer.model` or `tokenizer.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from keras_gemma2.checkpoints.hf_config import (
    config_from_hugging_face,
    dtype_from_hugging_face,
    is_hugging_face_config,
    stop_token_ids_from_hugging_face,
)
from keras_gemma2.checkpoints.sentencepiece_model import read_model
from keras_gemma2.checkpoints.source import (
    CONFIG_FILE,
    HUGGING_FACE,
    Source,
    file_inside,
    find_file,
    read_json,
)
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError, MissingFileError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON_FILE = "tokenizer.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


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

    tensors = _open_files(source.path, stack)
    if HEAD in tensors and EMBEDDING in tensors:
        _check_tied_head(tensors, source.path)
        del tensors[HEAD]
    return tensors, dict(rows_for(config, HUGGING_FACE))


def vocabulary(source: Source) -> bytes | None:
    """The bytes of tokenizer.model, or of a model made of tokenizer.json, which transformers 5 saves alone."""
    path = find_file(source.path, TOKENIZER_FILE)
    if path is not None:
        return read_model(path)
    path = find_file(source.path, TOKENIZER_JSON_FILE)
    if path is None:
        return None
    from keras_gemma2.checkpoints.tokenizer_json import from_tokenizer_json

    return from_tokenizer_json(read_json(path), path)


def _open_files(folder: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy tensors of every file, by name; a base model's names get the prefix of the full one's."""
    from keras_gemma2.checkpoints.safetensors_file import open_safetensors

    tensors: dict[str, Any] = {}
    for path in _weight_files(folder):
        for key, tensor in open_safetensors(path, stack).items():
            full = key if key.startswith("model.") or key == HEAD else f"model.{key}"
            if full in tensors:
                raise CheckpointError(f"The tensor {key!r} stands twice in the safetensors of {folder}.")
            tensors[full] = tensor
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
        raise MissingFileError(f"No {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}. Download the weights.")
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
