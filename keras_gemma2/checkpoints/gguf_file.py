"""Tensors of GGUF files, read and dequantized in slices of rows.

The formulas of the quantized types are those of the `gguf` package, which only quantized files need.
Types and their blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma2.checkpoints.gguf_header import PLAIN_TYPES, Header, TensorInfo
from keras_gemma2.checkpoints.safetensors_file import SafetensorsTensor
from keras_gemma2.errors import CheckpointError


class QuantizedTensor:
    """A matrix [rows, columns] in a quantized type; slicing reads and dequantizes the rows asked for, to float32.

    Args:
        rows: the bytes of each row, sliced lazily: [rows, bytes].
        columns: elements of a row.
        dequantize: from uint8 [rows, bytes] to float32 [rows, columns].
    """

    is_quantized = True

    def __init__(self, rows: Any, columns: int, dequantize: Callable[[np.ndarray], np.ndarray]) -> None:
        self._rows, self._dequantize = rows, dequantize
        self.shape, self.dtype = (rows.shape[0], columns), np.dtype("float32")

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        with np.errstate(all="ignore"):  # damaged scales become NaN, which the loader names
            block = self._dequantize(self._rows[index[0]])
        return block[(slice(None), *index[1:])] if index[1:] else block


def open_tensors_of(header: Header, stack: Any) -> dict[str, Any]:
    """Lazy tensors of a file, by name. Nothing is read yet.

    Args:
        header: the file's.
        stack: a `contextlib.ExitStack` that closes it.

    Raises:
        CheckpointError: if a tensor lies outside the file or over another, or its type cannot be read.
    """
    descriptor = os.open(header.path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    size = os.fstat(descriptor).st_size
    tensors, spans = {}, []
    for info in header.tensors:
        tensors[info.name], count = _open_tensor(header, info, descriptor)
        spans.append((info.start, info.start + count, info.name))
    spans.sort()
    for (_, end, name), (start, _, following) in zip(spans, [*spans[1:], (size, size, "the end of the file")]):
        if end > start:
            raise CheckpointError(f"The tensor {name!r} of {header.path} reaches beyond {following!r}. Download it again.")
    return tensors


def _open_tensor(header: Header, info: TensorInfo, descriptor: int) -> tuple[Any, int]:
    """The lazy tensor, and how many bytes it takes."""

    def plain(shape: tuple[int, ...], dtype: Any) -> Any:  # rows of numbers at an offset: the same there as here
        return SafetensorsTensor(descriptor, header.path, info.start, shape, np.dtype(dtype))

    if info.kind in PLAIN_TYPES:
        tensor = plain(info.shape, getattr(ml_dtypes, PLAIN_TYPES[info.kind], PLAIN_TYPES[info.kind]))
        return tensor, math.prod(info.shape) * tensor.dtype.itemsize
    block, block_bytes, dequantize = _quantization(header.path, info)
    if len(info.shape) != 2 or info.shape[1] % block:
        raise CheckpointError(
            f"The tensor {info.name!r} of {header.path} has shape {info.shape}; its type has blocks of {block} elements along "
            "the rows of a matrix. Convert the model again."
        )
    row_bytes = info.shape[1] // block * block_bytes
    rows = plain((info.shape[0], row_bytes), np.uint8)
    return QuantizedTensor(rows, info.shape[1], dequantize), info.shape[0] * row_bytes


def _quantization(path: str, info: TensorInfo) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    """Elements and bytes of one block of a quantized type, and what dequantizes rows of them."""
    try:
        import gguf
        from gguf import quants
    except ImportError as error:
        raise CheckpointError(f"{path} is quantized, and reading it needs the package gguf: pip install gguf.") from error
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)  # raises for types that the package cannot read
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"The tensor {info.name!r} of {path} has the type {info.kind}, which the installed gguf package cannot dequantize "
            f"({error}). Update it, or take another quantization."
        ) from error
    return block, block_bytes, lambda rows: quants.dequantize(rows, kind)
