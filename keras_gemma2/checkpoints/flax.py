"""Reading Orbax checkpoints of Gemma 2, the format of Google's Flax releases.

Source of the names and layouts: https://github.com/google-deepmind/gemma, the Gemma 2 checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from keras_gemma2.checkpoints.orbax_arrays import ARRAY_FILES, DATABASE_FILE, TREE_FILE, open_arrays
from keras_gemma2.checkpoints.source import FLAX, Source, find_file
from keras_gemma2.checkpoints.without_config import (
    has_main_weights,
    published_size,
    source_of_config,
    vocabulary_beside,
)
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

OLD_TREE_FILE = "checkpoint"  # msgpack, in checkpoints of plain files before there was _METADATA; not read
STEP_FILE = "_CHECKPOINT_METADATA"
PADDED_VOCABULARY, VOCABULARY = 256128, 256000  # rows in Google's Flax releases, and of the model
EMBEDDING = "transformer/embedder/input_embedding"
_DEEPEST_ARRAY = 4  # folders between a checkpoint's and its arrays'


def read_source(name: str, path: str) -> Source | None:
    """Recognizes an Orbax folder, or a folder around one, by the files in it.

    Without a config.json beside, the arrays' headers are read, and must be those of a published size.
    """
    folder = _find_checkpoint(path)
    if folder is None:
        return None
    source = source_of_config(name, FLAX, path, *dict.fromkeys((path, folder)))
    if source is not None:
        return source
    with contextlib.ExitStack() as stack:
        tensors = open_arrays(folder, _table_name, stack)
        _cut_padding(tensors, VOCABULARY, only_published=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return Source(name, FLAX, published_size(shapes, lambda size: _cells(size, shapes, path), path), path)


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every array of the checkpoint, and the table's cells for the layouts that its shapes show."""
    tensors = open_arrays(_find_checkpoint(source.path), _table_name, stack)
    _cut_padding(tensors, source.config.vocabulary_size, only_published=not source.values)
    return tensors, _cells(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, source.path)


def vocabulary(source: Source) -> bytes | None:
    """The bytes of tokenizer.model, in the folder or the one above."""
    return vocabulary_beside(source)


# Which folder ---------------------------------------------------------------------------------------------------------


def _find_checkpoint(path: str) -> str | None:
    """The folder with the arrays: this one, or the only such one in it, or in the only step in it."""
    if not os.path.isdir(path) or has_main_weights(path):
        return None
    if _is_checkpoint(path):
        return path
    found = []
    for folder in _folders(path):
        inner = _folders(folder) if find_file(folder, STEP_FILE) and not _is_checkpoint(folder) else [folder]
        found += [candidate for candidate in inner if _is_checkpoint(candidate)]
    if len(found) > 1:
        names = sorted(os.path.relpath(folder, path) for folder in found)
        raise CheckpointError(f"{path} holds several Flax checkpoints: {names[:10]}. Pass the path of one.")
    return found[0] if found else None


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir())
    except OSError:  # a folder that may not be looked into is none of a checkpoint
        return []


def _is_checkpoint(folder: str) -> bool:
    if find_file(folder, DATABASE_FILE, TREE_FILE):
        return True
    return find_file(folder, OLD_TREE_FILE) is not None and _has_arrays(folder, _DEEPEST_ARRAY)


def _has_arrays(folder: str, depth: int) -> bool:
    inner = _folders(folder)
    return any(find_file(path, *ARRAY_FILES) for path in inner) or (
        depth > 0 and any(_has_arrays(path, depth - 1) for path in inner)
    )


# Which layout ---------------------------------------------------------------------------------------------------------


def _cut_padding(tensors: dict[str, Any], rows: int, only_published: bool) -> None:
    """Drops the embedding rows behind the vocabulary: those of Google's releases, or those a config says are none."""
    from keras_gemma2.checkpoints.layout import Part

    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] <= rows:
        return
    if not only_published or (embedding.shape[0], rows) == (PADDED_VOCABULARY, VOCABULARY):
        tensors[EMBEDDING] = Part(embedding, 0, rows)


def _table_name(stored: str) -> str:
    """`layer_0.attn.q_einsum.w`, `params/transformer/layer_0.mlp.linear`, ... as the weight table has it."""
    name = stored.replace(".", "/").removeprefix("params/").removeprefix("transformer/")
    return f"transformer/{name}/w" if name.endswith(("_einsum", "mlp/linear")) else f"transformer/{name}"


def _cells(config: Gemma2Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The table's cells: with the gates transposed as in 9B and 27B, with queries fused as where N is K, if they are."""
    from keras_gemma2.checkpoints.weight_map import rows_for

    transposed = (2, config.intermediate_dim, config.hidden_dim)
    cells = dict(rows_for(config, FLAX))
    for path, cell in cells.items():
        prefix, _, _ = cell.name.rpartition("/attn/")
        fused = f"{prefix}/attn/qkv_einsum/w"
        if fused in shapes and path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            part = ("query", "key", "value").index(path.split("/")[-2])
            cells[path] = dataclasses.replace(cell, name=fused, part=part, stacked=True)
        if cell.name.endswith("gating_einsum/w") and shapes.get(cell.name) == transposed:
            if config.hidden_dim == config.intermediate_dim:
                raise CheckpointError(
                    f"The gates of {where} can be read in two ways: hidden_dim and intermediate_dim are both "
                    f"{config.hidden_dim}, so the shape of {cell.name!r} does not tell which axis comes first."
                )
            cells[path] = dataclasses.replace(cell, pattern="")
    return cells
