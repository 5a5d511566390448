"""How one tensor is laid out in another format, and the way from there to ours and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

ELEMENTS_A_BLOCK = 1 << 19  # a block stays in the processor's cache between being read, checked and copied


class Tensor(Protocol):
    """An array that is read from a file when it is sliced: numpy's arrays and our readers' tensors.

    Quantized ones give floats, and say so by an attribute `is_quantized`.
    """

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, index: Any) -> np.ndarray: ...


class Layout:
    """An einops-like pattern from a foreign tensor's axes to ours, such as `"N D H -> (N H) D"`.

    Axes are the letters of the package's dimension key. Ours is a vector or a matrix `[out, in]`.

    Args:
        pattern: theirs, an arrow, ours; every letter once on each side.

    Example:
        >>> Layout("D F -> F D").foreign_shape({"D": 4, "F": 6})
        (4, 6)
    """

    def __init__(self, pattern: str) -> None:
        theirs, ours = pattern.split("->")
        self.foreign_axes = tuple(theirs.split())
        groups = ours.replace("(", " ( ").replace(")", " ) ").split()
        self.groups = _grouped(groups)
        flat = [axis for group in self.groups for axis in group]
        self._to_ours = tuple(self.foreign_axes.index(axis) for axis in flat)
        self._to_theirs = tuple(flat.index(axis) for axis in self.foreign_axes)

    def foreign_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the foreign tensor."""
        return tuple(sizes[axis] for axis in self.foreign_axes)

    def row_blocks(self, tensor: Tensor, region: tuple[slice, ...] | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows of ours out of a foreign tensor, a bounded number of elements at a time.

        Args:
            tensor: the foreign one.
            region: the rows and columns of ours that are wanted, as slices with both ends; None for all.
        """
        shape, sizes = tensor.shape, dict(zip(self.foreign_axes, tensor.shape))
        axis = self._to_ours[0]  # the outermost part of our rows
        inner = self._inner(0, sizes)  # rows of ours for each of its entries
        rows = range(shape[axis] * inner)[region[0] if region else slice(None)]
        cut, columns = self._columns(region, sizes)
        a_slice = math.prod(sizes.values()) // max(1, shape[axis])
        step = max(1, ELEMENTS_A_BLOCK // max(1, a_slice))
        for start in range(rows.start // inner, -(-rows.stop // inner), step):
            stop = min(start + step, -(-rows.stop // inner))
            index = dict.fromkeys(range(len(shape) if cut else axis + 1), slice(None)) | cut | {axis: slice(start, stop)}
            sizes[self.foreign_axes[axis]] = stop - start
            block = np.asarray(tensor[tuple(index.values())])
            block = block.transpose(self._to_ours).reshape([math.prod(sizes[a] for a in group) for group in self.groups])
            block = block[max(0, rows.start - start * inner) : rows.stop - start * inner]
            yield block if columns is None else block[:, columns]

    def _inner(self, group: int, sizes: Mapping[str, int]) -> int:
        return max(1, math.prod(sizes[letter] for letter in self.groups[group][1:]))

    def _columns(self, region: tuple[slice, ...] | None, sizes: dict[str, int]) -> tuple[dict[int, slice], slice | None]:
        """What of another axis of theirs is read for some columns of ours, its size being put down, and what is cut out after."""
        if region is None or len(region) < 2:
            return {}, None
        letter, inner = self.groups[1][0], self._inner(1, sizes)
        wanted = range(sizes[letter] * inner)[region[1]]
        if len(wanted) == sizes[letter] * inner:
            return {}, None
        first, last = wanted.start // inner, -(-wanted.stop // inner)
        sizes[letter] = last - first
        read = {self.foreign_axes.index(letter): slice(first, last)}
        return read, slice(wanted.start - first * inner, wanted.stop - first * inner)

    def to_foreign(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One of our tensors in the foreign layout."""
        split = array.reshape([sizes[axis] for group in self.groups for axis in group])
        return np.ascontiguousarray(split.transpose(self._to_theirs))


@functools.cache
def layout(pattern: str) -> Layout:
    """The layout of a pattern, parsed once."""
    return Layout(pattern)


class Part:
    """Rows `start` to `stop` of a tensor, or with `stacked`, its slice `start` along a first axis that is dropped."""

    def __init__(self, tensor: Tensor, start: int, stop: int, stacked: bool = False) -> None:
        self._tensor, self._start, self._stacked = tensor, start, stacked
        self.shape = tuple(tensor.shape[1:]) if stacked else (stop - start, *tensor.shape[1:])
        self.dtype = tensor.dtype
        self.is_quantized = getattr(tensor, "is_quantized", False)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if self._stacked:
            return np.asarray(self._tensor[(slice(self._start, self._start + 1), *index)])[0]
        rows = range(self._start, self._start + self.shape[0])[index[0]]
        return self._tensor[(slice(rows.start, rows.stop), *index[1:])]


def _grouped(tokens: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    inside = False
    for token in tokens:
        if token in "()":
            inside = token == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups
