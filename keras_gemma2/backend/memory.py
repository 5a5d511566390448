"""Memory that a framework can take over without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; XLA and TensorFlow copy what is aligned less


def gather_rows(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Consecutive blocks of rows in one aligned array, converted to its dtype; one block is in memory at a time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    array, start = memory[offset : offset + size].view(dtype).reshape(shape), 0
    for block in blocks:
        array[start : start + block.shape[0]] = block
        start += block.shape[0]
    return array
