"""Memory that a framework can take over without a copy."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; XLA and TensorFlow copy what is aligned less


def gather_rows(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Consecutive blocks of rows in one aligned array, converted to its dtype; one block is in memory at a time."""
    array, start = _mapped(shape, np.dtype(dtype)), 0
    for block in blocks:
        array[start : start + block.shape[0]] = block
        start += block.shape[0]
    return array


def untouched(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An aligned array of whatever was there; its pages are not in memory until they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)


def counted_peak(function: Callable[[], Any]) -> int | None:
    """Bytes that a call holds at its peak beside what is there after it, where the framework's allocator counts them; else None.

    JAX and PyTorch give freed memory of CPUs back to the C library, so that the process's resident memory tells.
    """
    return None


def _mapped(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An aligned array to be filled at once, from pages of the usual size, made in one call where the system can.

    numpy asks for huge pages, whose first touch is slow where memory is fragmented or virtual: filling 1.8 GB took 6 s,
    and 1.2 s this way.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_POPULATE"):
        return untouched(shape, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)
