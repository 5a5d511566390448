"""Safetensors files, read in slices and written tensor by tensor.

The `safetensors` library validates each file. Reading itself goes past it: its memory map counts as this process's memory
once touched, so that loading would hold the weights twice, and its writer wants all tensors of a file in memory.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from keras_gemma2.checkpoints.file_rows import columns_of, read_rows
from keras_gemma2.checkpoints.source import refuse_lfs_pointer
from keras_gemma2.errors import CheckpointError

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsTensor:
    """A tensor in a file; slicing reads the rows asked for.

    Args:
        file: an open file descriptor.
        path: the file's, for messages.
        offset: where its data starts, in bytes.
        shape: the tensor's.
        dtype: the tensor's.
    """

    def __init__(self, file: int, path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._file, self._path, self._offset = file, path, offset
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        rows = range(self.shape[0])[index[0]]
        if columns := columns_of(index, self.shape):
            return read_rows(self._file, self._path, self._offset, self.shape, self.dtype, rows.start, rows.stop, columns)
        block = read_rows(self._file, self._path, self._offset, self.shape, self.dtype, rows.start, rows.stop)
        return block[(slice(None), *index[1:])] if index[1:] else block


def open_safetensors(path: str, stack: Any) -> dict[str, SafetensorsTensor]:
    """Every tensor of a file, by name; nothing but the header is read.

    Args:
        path: the file.
        stack: a `contextlib.ExitStack` that closes it.

    Raises:
        CheckpointError: if the header does not describe the file: lengths, offsets, shapes and dtypes must fit.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:  # the library would say that there is no such file, whatever is wrong with it
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    stack.callback(os.close, descriptor)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        refuse_lfs_pointer(path)
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}). Download it again.") from error
    header, start = _header(descriptor, path)
    if len(names) != len(header):
        raise CheckpointError(f"{path} is not a safetensors file that this version reads: its header is ambiguous.")
    return {name: _tensor(descriptor, path, name, header[name], start) for name in names}


def _header(descriptor: int, path: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")

    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twins = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1} if len(pairs) < 8 else set()
        keys = [key for key, _ in pairs]
        if twins or len(set(keys)) != len(keys):
            raise CheckpointError(f"A key stands twice in the header of {path}. Download it again.")
        return dict(pairs)

    header = json.loads(os.pread(descriptor, length, 8).decode("utf-8"), object_pairs_hook=refuse_twins)
    header.pop("__metadata__", None)
    return header, 8 + length


def _tensor(descriptor: int, path: str, name: str, entry: Mapping[str, Any], start: int) -> SafetensorsTensor:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"The tensor {name!r} of {path} has dtype {entry['dtype']}; those read are {', '.join(DTYPES)}.")
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    if math.prod(shape) * dtype.itemsize != end - first or start + end > os.fstat(descriptor).st_size:
        raise CheckpointError(f"The tensor {name!r} of {path} does not fit its offsets. Download it again.")
    return SafetensorsTensor(descriptor, path, start + first, shape, dtype)


def write_safetensors(
    path: str,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]],
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes a file tensor by tensor, in blocks of rows.

    Args:
        path: the file; it must not exist yet.
        tensors: by name, the shape, the dtype and consecutive rows already in that dtype.
        progress: called with the number of bytes just written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype, _) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, blocks in tensors.values():
            for block in blocks:
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
                if progress is not None:
                    progress(block.nbytes)
