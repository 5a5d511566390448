"""Rows of an array that lies in a file as it is, read past any memory map: mapped pages count as the process's memory."""

from __future__ import annotations

import math
import os

import numpy as np

from keras_gemma2.errors import CheckpointError


def read_rows(
    file: int, path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    """Consecutive rows, as a new array.

    Args:
        file: an open file descriptor.
        path: the file's, for messages.
        offset: where the array starts, in bytes.
        shape: the array's.
        dtype: the array's.
        start: first row.
        stop: the row after the last.

    Raises:
        CheckpointError: if the file ends before.
    """
    block = np.empty((max(0, stop - start), *shape[1:]), dtype)
    buffer = memoryview(block.reshape(-1).view(np.uint8))
    offset += start * math.prod(shape[1:]) * dtype.itemsize
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path} became shorter while it was read.")
        done += count
    return block
