"""Weights on their way out, whether of a model or of another checkpoint: by our paths, in blocks of rows, cast on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
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
        policy: the dtype policy that readers load them in unless told otherwise; None for `dtype`.
        dtypes: by path, the dtype of weights that are stored in another one than `dtype`.

    Example:
        >>> weights = outgoing_from_backbone(lm.backbone, "bfloat16")
        >>> for path, shape in weights.shapes.items():
        ...     for block in weights.blocks(path): ...
    """

    config: Gemma2Config
    dtype: np.dtype
    row_blocks: Callable[[str], Iterator[np.ndarray]]
    policy: str | None = None
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)

    def dtype_of(self, path: str) -> np.dtype:
        """What a weight is stored in."""
        return self.dtypes.get(path, self.dtype)

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
        return sum(math.prod(shape) * self.dtype_of(path).itemsize for path, shape in self.shapes.items())

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """Consecutive rows of a weight, in the dtype it is stored in.

        Raises:
            CheckpointError: if a finite value does not fit the dtype's range.
        """
        dtype = self.dtype_of(path)
        for block in self.row_blocks(path):
            if block.dtype == dtype:
                yield block
                continue
            with np.errstate(over="ignore"):  # an overflow is refused next
                converted = block.astype(np.float32).astype(dtype)
            if dtype.name == "float16" and (np.isinf(converted) & np.isfinite(block.astype(np.float32))).any():
                largest = np.abs(block.astype(np.float32)).max()
                raise CheckpointError(f"The weight {path!r} does not fit `dtype` float16: its largest value is {largest}.")
            yield converted

    def array(self, path: str) -> np.ndarray:
        """A whole weight, in the dtype it is stored in."""
        array, start = np.empty(self.shapes[path], self.dtype_of(path)), 0
        for block in self.blocks(path):
            array[start : start + len(block)] = block
            start += len(block)
        return array


def stored(dtype: str, argument: str = "dtype") -> np.dtype:
    """The numpy dtype of a name.

    Args:
        dtype: the name.
        argument: what the caller's argument is called, for messages.

    Raises:
        ValueError: for one that weights are not stored in.
    """
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise ValueError(f"`{argument}` must be one of {sorted(STORED_DTYPES)}. Received: {dtype!r}.")
    return STORED_DTYPES[dtype]


def outgoing_from_backbone(backbone: Any, dtype: str | None = None) -> OutgoingWeights:
    """The weights of a model; those of a quantized one as the floats that its codes and scales stand for.

    Where an adapter is active, they are those with it added; the model is not changed.

    Args:
        backbone: a `Gemma2Backbone`.
        dtype: what to store them in; default that of its variables, for a quantized one that of the floats it was made of.

    Raises:
        ValueError: for a dtype that weights are not stored in.
    """
    from keras_gemma2 import backend

    own = backbone.dtype_policy.variable_dtype
    if dtype is None and own not in STORED_DTYPES:
        raise ValueError(
            f"The model is {own}, and weights are stored in one of {sorted(STORED_DTYPES)}. Pass one as `dtype=` to "
            "`export_to_transformers`."
        )
    named = backbone.named_weights(merged=True)

    def row_blocks(path: str) -> Iterator[np.ndarray]:
        weight = named[path]
        rows = max(1, ELEMENTS_A_BLOCK // max(1, math.prod(weight.shape[1:])))
        is_computed = hasattr(weight, "row_blocks")
        return weight.row_blocks(rows) if is_computed else backend.numpy_row_blocks(weight.value, rows)

    return OutgoingWeights(backbone.config, stored(own if dtype is None else dtype), row_blocks)


def outgoing_from_entries(
    entries: dict[str, Any], config: Gemma2Config, dtype: str | None = None, policy: str | None = None, where: str = ""
) -> OutgoingWeights:
    """The weights of an opened checkpoint (`reading.open_weights`).

    Args:
        entries: its weights by our paths.
        config: the model's.
        dtype: what to store them in; None for what each is stored in now, and `policy` for quantized ones.
        policy: the dtype policy that readers load them in; None for the stored dtype.
        where: the checkpoint, for the warning that a weight is not finite.
    """
    from keras_gemma2.checkpoints.reading import watched

    def row_blocks(path: str) -> Iterator[np.ndarray]:
        return watched(entries[path].row_blocks(), entries[path].cell.name, where)

    if dtype is not None:
        return OutgoingWeights(config, stored(dtype), row_blocks, policy)
    own = {path: _own_dtype(entry.tensor, policy) for path, entry in entries.items()}
    main = own["token_embedding/embeddings"]
    return OutgoingWeights(config, main, row_blocks, policy, {path: kind for path, kind in own.items() if kind != main})


def _own_dtype(tensor: Any, policy: str | None) -> np.dtype:
    name = np.dtype(tensor.dtype).name
    if getattr(tensor, "is_quantized", False):
        name = policy or "bfloat16"
    return STORED_DTYPES.get(name, STORED_DTYPES["float32"])
