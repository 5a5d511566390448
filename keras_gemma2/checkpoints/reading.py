"""From a checkpoint of any format to a model: open its weights, fill a backbone."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.formats import READERS, find_source, vocabulary
from keras_gemma2.checkpoints.source import Source
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import callers_level

__all__ = ["fill", "find_source", "is_finite", "open_weights", "stored_dtype", "vocabulary", "watched"]

# Exponent bits of each width: all of them set means infinity or NaN.
_NOT_FINITE = {
    "float32": (np.int32, 0x7FFFFFFF, 0x7F800000),
    "float16": (np.int16, 0x7FFF, 0x7C00),
    "bfloat16": (np.int16, 0x7FFF, 0x7F80),
}


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


def stored_dtype(entries: dict[str, Any]) -> str:
    """The dtype most of the weights are stored in, as Keras names it."""
    return np.dtype(entries["token_embedding/embeddings"].tensor.dtype).name


def fill(backbone: Any, entries: dict[str, Any], where: str) -> None:
    """Assigns every weight of a backbone from an opened checkpoint, one tensor at a time; quantized ones by blocks of rows.

    Codes that the checkpoint holds are taken as they are, where the backbone's are of the same kind. Of several processes that hold
    a model between them each reads its own part.

    Warns of values that are not finite, naming the weight.
    """
    from keras_gemma2 import backend

    for path, weight in backbone.named_weights().items():
        tensor, name = entries[path].tensor, entries[path].cell.name
        mode = getattr(weight, "mode", None)
        if mode is None:
            region = backend.own_region(weight)
            backend.assign_row_blocks(weight, watched(entries[path].row_blocks(region), name, where), region)
        elif mode == getattr(tensor, "mode", None):
            regions = weight.own_regions()
            weight.assign_quantized(tensor.codes(regions[0]), watched(tensor.scales(regions[1]), name, where), regions)
        else:
            rows = weight.own_rows()
            weight.assign_row_blocks(watched(entries[path].row_blocks(rows), name, where), rows)


def watched(blocks: Iterator[np.ndarray], name: str, where: str) -> Iterator[np.ndarray]:
    """The blocks of a weight as they come; warns, once, if values are not finite.

    Args:
        blocks: of one weight.
        name: what the checkpoint calls it.
        where: the checkpoint.
    """
    warned = False
    for block in blocks:
        if not warned and not is_finite(block):
            warned = True
            warnings.warn(
                f"The weight {name!r} of {where} has values that are NaN or infinite: outputs will be NaN.",
                stacklevel=callers_level(),
            )
        yield block


def is_finite(block: np.ndarray) -> bool:
    """Whether every value is finite; looks at the bits, which is faster than `isfinite`, above all for bfloat16."""
    if block.dtype.name not in _NOT_FINITE or not block.size:
        return bool(np.isfinite(block.astype(np.float32)).all())
    integer, mask, limit = _NOT_FINITE[block.dtype.name]
    bits = block.view(integer)  # as it lies, transposed or not
    return int((bits & integer(mask)).max()) < limit
