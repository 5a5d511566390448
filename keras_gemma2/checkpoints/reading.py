"""From a checkpoint of any format to a model: find out what it is, open its weights, fill a backbone."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.source import FLAX, GEMMA_PYTORCH, GGUF, HUGGING_FACE, KERAS, KERAS_HUB, Source
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

# The modules that read each kind, in the order in which they are asked. Each has
# `read_source(name, path) -> Source | None`, None for what is not of its kind;
# `open_tensors(source, config, stack) -> (tensors, cells)`: lazy tensors by foreign name, and the table's cells for them;
# `vocabulary(source) -> bytes | None`: the SentencePiece model.
READERS = {
    HUGGING_FACE: "keras_gemma2.checkpoints.hf",
    KERAS: "keras_gemma2.checkpoints.keras_preset",
    KERAS_HUB: "keras_gemma2.checkpoints.keras_hub",
    GGUF: "keras_gemma2.checkpoints.gguf",
    GEMMA_PYTORCH: "keras_gemma2.checkpoints.gemma_pytorch",
    FLAX: "keras_gemma2.checkpoints.flax",
}
# Exponent bits of each width: all of them set means infinity or NaN.
_NOT_FINITE = {
    "float32": (np.int32, 0x7FFFFFFF, 0x7F800000),
    "float16": (np.int16, 0x7FFF, 0x7C00),
    "bfloat16": (np.int16, 0x7FFF, 0x7F80),
}


def find_source(name: str, path: str) -> Source:
    """Finds out by its content what a local folder or file is.

    Args:
        name: as the user gave it, for messages.
        path: the folder or file.

    Raises:
        CheckpointError: if it is no Gemma 2 that this package reads; says what it is instead.
    """
    for module in READERS.values():
        source = importlib.import_module(module).read_source(name, path)
        if source is not None:
            return source
    if os.path.isfile(path):
        raise CheckpointError(
            f"The file {path!r} is no checkpoint that this package reads: those are .gguf and .ckpt files, and folders. "
            "Unpack an archive first and pass its folder."
        )
    try:
        held = sorted(os.listdir(path))[:10]
    except OSError as error:
        raise CheckpointError(f"The folder {path!r} cannot be read: {error}.") from error
    raise CheckpointError(f"The folder {path!r} is no preset: it has no config.json and no other checkpoint. It holds: {held}.")


@contextlib.contextmanager
def open_weights(source: Source, config: Gemma2Config | None = None) -> Iterator[dict[str, Any]]:
    """The weights of a checkpoint by our paths, each an `Entry` to read in blocks of rows. Names and shapes are checked.

    Args:
        source: from `find_source`.
        config: the model's; default the checkpoint's own.

    Raises:
        CheckpointError: if the tensors are not those of the config, before any is read.
    """
    from keras_gemma2.checkpoints.weight_map import match

    config = config or source.config
    with contextlib.ExitStack() as stack:
        tensors, cells = importlib.import_module(READERS[source.kind]).open_tensors(source, config, stack)
        yield match(tensors, config, cells, source.path)


def vocabulary(source: Source) -> bytes | None:
    """The serialized SentencePiece model of a checkpoint, or None."""
    return None if source.path is None else importlib.import_module(READERS[source.kind]).vocabulary(source)


def stored_dtype(entries: dict[str, Any]) -> str:
    """The dtype most of the weights are stored in, as Keras names it."""
    return np.dtype(entries["token_embedding/embeddings"].tensor.dtype).name


def fill(backbone: Any, entries: dict[str, Any], where: str) -> None:
    """Assigns every weight of a backbone from an opened checkpoint, one tensor at a time.

    Warns of values that are not finite, naming the weight.
    """
    from keras_gemma2 import backend

    for path, variable in backbone.named_weights().items():
        blocks = _watched(entries[path].row_blocks(), path, where)
        variable.assign(backend.tensor_from_row_blocks(blocks, tuple(variable.shape), variable.dtype))


def _watched(blocks: Iterator[np.ndarray], path: str, where: str) -> Iterator[np.ndarray]:
    warned = False
    for block in blocks:
        if not warned and not is_finite(block):
            warned = True
            warnings.warn(
                f"The weight {path!r} of {where} has values that are NaN or infinite: its outputs will be NaN.", stacklevel=6
            )
        yield block


def is_finite(block: np.ndarray) -> bool:
    """Whether every value is finite; looks at the bits, which is faster than `isfinite`, above all for bfloat16."""
    if block.dtype.name not in _NOT_FINITE or not block.size:
        return bool(np.isfinite(block.astype(np.float32)).all())
    integer, mask, limit = _NOT_FINITE[block.dtype.name]
    bits = np.ascontiguousarray(block).view(integer)
    return int((bits & integer(mask)).max()) < limit
