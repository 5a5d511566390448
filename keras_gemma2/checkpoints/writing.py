"""Weights on their way out, whether of a model or of another checkpoint: by our paths, in blocks of rows, cast on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma2.checkpoints.layout import ELEMENTS_A_BLOCK
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

STORED_DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class OutgoingWeights:
    """All weights of one model, to be written.

    Args:
        config: the model's.
        dtype: what they are to be stored in.
        row_blocks: from one of our paths to consecutive rows of that weight, in any float dtype.
        policy: the dtype that readers load them in unless told otherwise; None for `dtype`.

    Example:
        >>> weights = outgoing_from_backbone(lm.backbone, "bfloat16")
        >>> for path, shape in weights.shapes.items():
        ...     for block in weights.blocks(path): ...
    """

    config: Gemma2Config
    dtype: np.dtype
    row_blocks: Callable[[str], Iterator[np.ndarray]]
    policy: str | None = None

    @property
    def load_dtype(self) -> str:
        """What a written config says the weights are to be loaded in."""
        return self.policy or self.dtype.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, by path."""
        return self.config.weight_shapes()

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return self.config.parameter_count() * self.dtype.itemsize

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """Consecutive rows of a weight, in `dtype`.

        Raises:
            CheckpointError: if a finite value does not fit the dtype's range.
        """
        for block in self.row_blocks(path):
            if block.dtype == self.dtype:
                yield block
                continue
            with np.errstate(over="ignore"):  # an overflow is refused next
                converted = block.astype(np.float32).astype(self.dtype)
            if self.dtype.name == "float16" and (np.isinf(converted) & np.isfinite(block.astype(np.float32))).any():
                largest = np.abs(block.astype(np.float32)).max()
                raise CheckpointError(f"The weight {path!r} does not fit `dtype` float16: its largest value is {largest}.")
            yield converted

    def array(self, path: str) -> np.ndarray:
        """A whole weight, in `dtype`."""
        array, start = np.empty(self.shapes[path], self.dtype), 0
        for block in self.blocks(path):
            array[start : start + len(block)] = block
            start += len(block)
        return array


def stored(dtype: str) -> np.dtype:
    """The numpy dtype of a name.

    Raises:
        ValueError: for one that weights are not stored in.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"`dtype` must be one of {sorted(STORED_DTYPES)}. Received: {dtype!r}.")
    return STORED_DTYPES[dtype]


def outgoing_from_backbone(backbone: Any, dtype: str | None = None) -> OutgoingWeights:
    """The weights of a model.

    Args:
        backbone: a `Gemma2Backbone`.
        dtype: what to store them in; default that of its variables.
    """
    from keras_gemma2 import backend

    named = backbone.named_weights()

    def row_blocks(path: str) -> Iterator[np.ndarray]:
        shape = tuple(named[path].shape)
        rows = max(1, ELEMENTS_A_BLOCK // max(1, math.prod(shape[1:])))
        return backend.numpy_row_blocks(named[path].value, rows)

    return OutgoingWeights(backbone.config, stored(dtype or backbone.dtype_policy.variable_dtype), row_blocks)


def outgoing_from_entries(
    entries: dict[str, Any], config: Gemma2Config, dtype: str, policy: str | None = None
) -> OutgoingWeights:
    """The weights of an opened checkpoint (`reading.open_weights`).

    Args:
        entries: its weights by our paths.
        config: the model's.
        dtype: what to store them in.
        policy: the dtype that readers load them in; None for `dtype`.
    """
    return OutgoingWeights(config, stored(dtype), lambda path: entries[path].row_blocks(), policy)
