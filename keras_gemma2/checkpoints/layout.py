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

    def row_blocks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Consecutive rows of ours out of a foreign tensor, a bounded number of elements at a time."""
        shape = tensor.shape
        axis = self._to_ours[0]  # the outermost part of our rows
        a_slice = math.prod(shape) // max(1, shape[axis])
        step = max(1, ELEMENTS_A_BLOCK // max(1, a_slice))
        sizes = dict(zip(self.foreign_axes, shape))
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            block = np.asarray(tensor[(slice(None),) * axis + (slice(start, stop),)])
            sizes[self.foreign_axes[axis]] = stop - start
            yield block.transpose(self._to_ours).reshape([math.prod(sizes[a] for a in group) for group in self.groups])

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
