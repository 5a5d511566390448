"""Rows of an array that lies in a file as it is, read past any memory map: mapped pages count as the process's memory."""

from __future__ import annotations

import math
import os

import numpy as np

from keras_gemma2.errors import CheckpointError


def columns_of(index: tuple, shape: tuple[int, ...]) -> range | None:
    """The columns of a matrix that an index of rows and columns asks for, where reading them alone is worth it; else None.

    A sweep over columns, each time with the rows `:`, is better served by whole rows.
    """
    if len(shape) != 2 or len(index) < 2 or index[0] == slice(None):
        return None
    columns = range(shape[1])[index[1]]
    return columns if columns.step == 1 and 0 < len(columns) < shape[1] else None


def read_rows(
    file: int, path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int, columns: range | None = None
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
        columns: of a matrix, those that are read; None for all.

    Raises:
        CheckpointError: if the file ends before.
    """
    offset += start * math.prod(shape[1:]) * dtype.itemsize
    if columns is None:
        block = np.empty((max(0, stop - start), *shape[1:]), dtype)
        _fill(block.reshape(-1).view(np.uint8), file, path, offset)
        return block
    block = np.empty((max(0, stop - start), len(columns)), dtype)
    for i, row in enumerate(block.view(np.uint8)):
        _fill(row, file, path, offset + (i * shape[1] + columns.start) * dtype.itemsize)
    return block


def _fill(array: np.ndarray, file: int, path: str, offset: int) -> None:
    buffer, done = memoryview(array), 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path} became shorter while it was read.")
        done += count
