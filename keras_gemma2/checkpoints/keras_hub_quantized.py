"""Weights that Keras has quantized to int8 or int4, as lazy tensors of floats.

Format: `quantize` and `save_own_variables` of Keras 3.15's `EinsumDense` and `ReversibleEmbedding`: `vars/0` holds the codes,
`vars/1` scales by which they are to be divided. int4 has two codes a byte, the first in the low bits; its blockwise form
has in `vars/2` the zero points and in `vars/3` each row's block, and there codes minus zero point are *multiplied* by the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.layout import layout
from keras_gemma2.checkpoints.weight_map import Foreign, foreign_shapes
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError


def dequantized(tensors: Mapping[str, Any], config: Gemma2Config, cells: Mapping[str, Foreign], where: str) -> dict[str, Any]:
    """The tensors of a checkpoint, with each quantized one as one tensor of floats under the name of its codes.

    Args:
        tensors: by name, `.../vars/0` and so on.
        config: the model's.
        cells: our paths and the cells of the format.
        where: the folder, for messages.

    Raises:
        CheckpointError: for codes, scales or zero points that do not fit each other.
    """
    out, shapes = dict(tensors), foreign_shapes(config, cells)
    for cell in cells.values():
        stem = cell.name.removesuffix("0")
        parts = [out.get(f"{stem}{i}") for i in range(4)]
        shape = shapes[cell.name]
        if parts[0] is None or parts[1] is None or len(shape) < 2:
            continue
        for i in range(4):
            out.pop(f"{stem}{i}", None)
        try:
            out[cell.name] = _dequantized_tensor(shape, _reduced_axes(cell), *parts)
        except ValueError as error:
            raise CheckpointError(
                f"The quantized weight {cell.name!r} of {where} is not as Keras stores one of shape {shape}: {error}."
            ) from error
    return out


def _reduced_axes(cell: Foreign) -> tuple[int, ...]:
    """The axes of a kernel that a product sums over, which share a scale; for the embedding, those of one row."""
    if not cell.pattern:
        return (1,)
    pattern = layout(cell.pattern)
    return tuple(pattern.foreign_axes.index(axis) for axis in pattern.groups[1])


def _dequantized_tensor(shape: tuple[int, ...], reduced: tuple[int, ...], codes: Any, scale: Any, zero: Any, groups: Any) -> Any:
    if codes.dtype != np.int8:
        raise ValueError(f"its codes are {codes.dtype.name}")
    if scale.dtype.name not in ("float32", "bfloat16", "float16") or not scale.shape:
        raise ValueError(f"its scales are {scale.dtype.name} of shape {scale.shape}")
    if (zero is None) != (groups is None):
        raise ValueError("it has zero points or blocks, but not both")
    if codes.shape == shape and zero is None:
        return Int8Tensor(shape, reduced, codes, scale)
    if zero is None:
        return Int4Tensor(shape, reduced, codes, scale)
    return BlockwiseInt4Tensor(shape, reduced, codes, scale, zero, groups)


class Int8Tensor:
    """A tensor of int8 codes with a scale for each output; slicing gives float32.

    Args:
        shape: the tensor's.
        reduced: the axes that share a scale.
        codes: a lazy tensor.
        scale: a lazy tensor.
    """

    is_quantized = True

    def __init__(self, shape: tuple[int, ...], reduced: tuple[int, ...], codes: Any, scale: Any) -> None:
        kept = tuple(1 if axis in reduced else size for axis, size in enumerate(shape))
        if math.prod(scale.shape) != math.prod(kept):
            raise ValueError(f"it has scales of shape {scale.shape}")
        self.shape = shape
        self.dtype = scale.dtype  # that of the weights before; a model gets it unless another is asked for
        self._codes, self._scale = codes, scale[:].astype(np.float32).reshape(kept)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        of_scale = tuple(slice(None) if size == 1 else item for item, size in zip(index, self._scale.shape))
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is reported where a model is filled
            return self._codes[index].astype(np.float32) / self._scale[of_scale]


class Int4Tensor:
    """A tensor of int4 codes, two a byte, with a scale for each output; slicing gives float32.

    A kernel is stored as a matrix with as many rows as its summed axes have elements, the embedding as it is. For kernels with
    a head axis in front, that matrix is a reshaped kernel, not a transposed one.

    Args:
        shape: the tensor's.
        reduced: the axes that share a scale.
        codes: a lazy tensor `[rows, columns / 2]`.
        scale: a lazy tensor.
    """

    is_quantized = True

    def __init__(self, shape: tuple[int, ...], reduced: tuple[int, ...], codes: Any, scale: Any) -> None:
        self.shape, self.dtype, self._codes = shape, scale.dtype, codes
        self._is_embedding = reduced == (1,) and len(shape) == 2
        if self._is_embedding:
            self._rows, self._columns = shape
        else:
            self._rows = math.prod(shape[axis] for axis in reduced)
            self._columns = math.prod(shape) // self._rows
        if codes.shape != (self._rows, -(-self._columns // 2)):
            raise ValueError(f"its codes have shape {codes.shape}")
        self._scale = scale[:].astype(np.float32)
        self._check()

    def _check(self) -> None:
        if self._scale.shape != (self._rows if self._is_embedding else self._columns,):
            raise ValueError(f"it has scales of shape {self._scale.shape}")

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        first, last = range(self.shape[0])[index[0]], range(self.shape[-1])
        if len(index) == len(self.shape) and self.shape[-1] == self._columns:
            last = last[index[-1]]
        inner = math.prod(self.shape[1:])
        start, stop = first.start * inner // self._columns, -(-first.stop * inner // self._columns)
        if len(last) != self.shape[-1] and len(first) == self.shape[0]:
            values = self._values(slice(0, self._rows), last)
            return values.reshape(*self.shape[:-1], len(last))
        values = self._values(slice(start, stop), range(self._columns)).reshape(-1)
        skipped = first.start * inner - start * self._columns
        block = values[skipped : skipped + len(first) * inner].reshape(len(first), *self.shape[1:])
        return block[(slice(None), *index[1:])]

    def _values(self, rows: slice, columns: range) -> np.ndarray:
        """Part of the matrix, as float32."""
        codes = self._unpacked(rows, columns)
        scale = self._scale[rows, None] if self._is_embedding else self._scale[columns.start : columns.stop]
        with np.errstate(divide="ignore", invalid="ignore"):
            return codes / scale

    def _unpacked(self, rows: slice, columns: range) -> np.ndarray:
        start = columns.start // 2
        packed = self._codes[rows, slice(start, -(-columns.stop // 2))]
        codes = np.empty((*packed.shape, 2), np.float32)
        codes[..., 0] = (packed << 4) >> 4  # shifts of signed bytes keep the sign
        codes[..., 1] = packed >> 4
        return codes.reshape(len(packed), -1)[:, columns.start - 2 * start : columns.stop - 2 * start]


class BlockwiseInt4Tensor(Int4Tensor):
    """As `Int4Tensor`, with a scale and a zero point for each block of summed elements.

    Args:
        shape, reduced, codes: as there.
        scale: a lazy tensor `[blocks, columns]`; for the embedding `[rows, blocks]`.
        zero: a lazy tensor of int8, of the scale's shape.
        groups: a lazy tensor: the block of each row; for the embedding, of each column.
    """

    def __init__(self, shape: tuple[int, ...], reduced: tuple[int, ...], codes: Any, scale: Any, zero: Any, groups: Any) -> None:
        if len(scale.shape) != 2 or zero.shape != scale.shape or zero.dtype != np.int8 or len(groups.shape) != 1:
            raise ValueError(f"it has scales of shape {scale.shape} and zero points {zero.dtype.name} of shape {zero.shape}")
        self._zero, self._groups = zero[:].astype(np.float32), groups[:]
        super().__init__(shape, reduced, codes, scale)

    def _check(self) -> None:
        axis = 1 if self._is_embedding else 0
        blocks, length = self._scale.shape[axis], (self._columns if self._is_embedding else self._rows)
        in_range = np.isfinite(self._groups).all() and ((self._groups >= 0) & (self._groups < blocks)).all()
        if self._scale.shape[1 - axis] != (self._rows if self._is_embedding else self._columns):
            raise ValueError(f"it has scales of shape {self._scale.shape}")
        if self._groups.shape != (length,) or not in_range:
            raise ValueError(f"it does not name one of its {blocks} blocks for each of {length} elements")
        self._groups = self._groups.astype(np.int64)

    def _values(self, rows: slice, columns: range) -> np.ndarray:
        of_columns = slice(columns.start, columns.stop)
        if self._is_embedding:
            index = (rows, self._groups[of_columns])
            zero, scale = self._zero[index], self._scale[index]
        else:
            groups = self._groups[rows]
            zero, scale = self._zero[groups, of_columns], self._scale[groups, of_columns]
        return (self._unpacked(rows, columns) - zero) * scale
