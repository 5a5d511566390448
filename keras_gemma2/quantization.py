"""Matrices of weights in 8 or 4 bits: floats to codes and scales, and back, by rows. numpy only.

A weight is its code times a scale. The formats are of the kind that llama.cpp names q8_0 and q4_0 (symmetric, no zero points;
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h), with these numbers:

- "int8": codes int8 `[out, in]` in [-127, 127], one float32 scale for each row, `[out, 1]`: the row's largest magnitude / 127.
- "int4": codes uint8 `[out, in / 2]`. A byte's low four bits stand for a column of the left half of the matrix, its high four
  bits for the column as far into the right half; each holds q + 8, with q in [-8, 7]. One float32 scale for each group of
  consecutive columns, `[out, in / group]`. Scales may be negative, so that -8 serves whichever sign is largest in a group.
"""

from __future__ import annotations

import math

import numpy as np

MODES = ("int8", "int4")
CODES_DTYPES = {"int8": "int8", "int4": "uint8"}
LARGEST_GROUP = 64
ELEMENTS_AT_ONCE = 1 << 16  # of the search below: its arrays stay in the processor's cache
# Magnitudes in a group, in steps of its scale, that its largest one is tried at. 8 keeps the largest exact, more clips it to make
# the steps of the others finer.
_LARGEST_TRIED = (8.0, 8.6, 9.3)


def check_mode(mode: str) -> None:
    """Refuses a mode that is none of `MODES`.

    Raises:
        ValueError: naming those there are.
    """
    if mode not in MODES:
        raise ValueError(f"Weights are quantized to one of {MODES}. Received: {mode!r}.")


def group_size(columns: int) -> int:
    """How many consecutive columns share a scale in "int4": the largest power of two up to 64 that divides half the columns.

    Raises:
        ValueError: for an odd number of columns, which two halves do not make.

    Example:
        >>> group_size(2304), group_size(80)
        (64, 8)
    """
    if columns % 2:
        raise ValueError(f"'int4' needs an even number of columns, one half for each four bits of a byte. Received: {columns}.")
    return math.gcd(columns // 2, LARGEST_GROUP)


def codes_shape(shape: tuple[int, int], mode: str) -> tuple[int, int]:
    """The shape of the codes of a matrix `[out, in]`."""
    check_mode(mode)
    if mode == "int8":
        return shape
    group_size(shape[1])  # refuses an odd width
    return shape[0], shape[1] // 2


def scales_shape(shape: tuple[int, int], mode: str) -> tuple[int, int]:
    """The shape of the scales of a matrix `[out, in]`."""
    check_mode(mode)
    return shape[0], 1 if mode == "int8" else shape[1] // group_size(shape[1])


def quantized_bytes(shape: tuple[int, int], mode: str) -> int:
    """How many bytes codes and scales of a matrix `[out, in]` take."""
    return math.prod(codes_shape(shape, mode)) + 4 * math.prod(scales_shape(shape, mode))


def quantize_rows(rows: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of some rows of a matrix.

    Args:
        rows: floats `[n, in]` of any dtype.
        mode: "int8" or "int4".

    Returns:
        The codes and the float32 scales. A row (in "int4", a group) with NaN or infinity has a scale that is not finite.

    Raises:
        ValueError: for another mode, or an odd width in "int4".

    Example:
        >>> codes, scales = quantize_rows(np.array([[1.0, -0.5]]), "int8")
        >>> codes.tolist()
        [[127, -64]]
    """
    check_mode(mode)
    rows = widened(rows)
    if mode == "int8":
        return _int8_rows(rows)
    group = group_size(rows.shape[1])
    codes = np.empty((len(rows), rows.shape[1] // 2), np.uint8)
    scales = np.empty((len(rows), rows.shape[1] // group), np.float32)
    step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _int4_rows(rows[part], group)
    return codes, scales


def dequantize_rows(codes: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """The float32 rows `[n, in]` that codes and scales stand for.

    Args:
        codes: of some rows.
        scales: of the same rows.
        mode: "int8" or "int4".

    Example:
        >>> dequantize_rows(np.array([[127, -64]], "int8"), np.array([[0.5]], "float32"), "int8").tolist()
        [[63.5, -32.0]]
    """
    check_mode(mode)
    if mode == "int8":
        values = codes.astype(np.float32)
    else:
        half = codes.shape[1]
        values = np.empty((len(codes), 2 * half), np.float32)
        values[:, :half] = codes & 15
        values[:, half:] = codes >> 4
        values -= 8
    groups = values.reshape(*scales.shape, -1)
    with np.errstate(invalid="ignore"):  # scales that are not finite are told of where weights are read
        groups *= scales[..., None]
    return values


def widened(rows: np.ndarray) -> np.ndarray:
    """Floats as float32, contiguous; bfloat16 by its bits, which is faster than a conversion number by number."""
    if rows.dtype.name == "bfloat16":
        return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(rows, np.float32)


def _int8_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.maximum(rows.max(axis=1, keepdims=True), -rows.min(axis=1, keepdims=True)) / np.float32(127)
    return _rounded(rows, scales, -127, 127).astype(np.int8), scales


def _rounded(values: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Values in steps of their scales; zeros where a scale is zero or not finite."""
    usable = np.isfinite(scales) & (scales != 0)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = values / np.where(usable, scales, np.float32(np.inf))
    np.rint(codes, out=codes)
    if not usable.all():
        np.copyto(codes, 0, where=~usable)
    return np.clip(codes, lowest, highest, out=codes)


def _int4_rows(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, two a byte, and scales; for each group the scale of least squared error among those tried.

    With codes q of a tried scale, the best scale for these codes is (x . q) / (q . q), and the error is x . x less
    (x . q)^2 / (q . q): so the trial with the largest of these last is the best.
    """
    x = rows.reshape(len(rows), -1, group)
    low, high = x.min(axis=2), x.max(axis=2)
    largest = np.where(-low > high, low, high)
    best, scales = np.full(largest.shape, -1, np.float32), np.zeros(largest.shape, np.float32)
    codes = np.zeros(x.shape, np.float32)
    for steps in _LARGEST_TRIED:
        tried = _rounded(x, (largest / np.float32(-steps))[..., None], -8, 7)
        along, squared = np.einsum("rgk,rgk->rg", x, tried), np.einsum("rgk,rgk->rg", tried, tried)
        squared = np.maximum(squared, 1)  # all codes zero: so is `along`
        gain = along * along / squared
        better = gain > best
        np.copyto(codes, tried, where=better[..., None])
        best, scales = np.where(better, gain, best), np.where(better, along / squared, scales)
    scales = np.where(np.isfinite(largest), scales, np.float32(np.nan))
    nibbles = (codes + 8).astype(np.uint8).reshape(len(rows), -1)
    half = rows.shape[1] // 2
    return nibbles[:, :half] | (nibbles[:, half:] << 4), scales
