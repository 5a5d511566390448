"""int8 codes in the order in which FBGEMM reads them, and its product with rows of floats.

FBGEMM's 8-bit products are exact for left sides of 7 bits: their sums of two products fit in 16 bits (AVX2's vpmaddubsw saturates).
Rows of floats are written in base 128 with such digits, each digit a row of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

ROWS_A_PIECE = 1 << 14  # packing takes the memory of a piece a thread besides; smaller pieces are slower to multiply
_BASE, _ZERO = 128, 64
_LARGEST = 8_100.0  # what two digits between -64 and 63 can write, either sign


class PackedInt8:
    """A packed matrix of int8 codes `[out, in]`."""

    def __init__(self, codes: torch.Tensor) -> None:
        pieces = codes.split(ROWS_A_PIECE)
        threads = min(torch.get_num_threads(), len(pieces))
        with _fbgemm(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
            self.pieces = list(pool.map(_prepacked, pieces))

    def unpacked(self) -> torch.Tensor:
        """The codes in plain order."""
        return torch.cat([piece.unpack()[0].int_repr() for piece in self.pieces])

    @staticmethod
    def takes(codes: torch.Tensor) -> bool:
        """Whether there is a packed form; of what it is made of in PyTorch, some is announced to go."""
        return codes.dtype == torch.int8 and _has_fbgemm()

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 `rows [n, in]` times the matrix transposed: float32 `[n, out]`.

        The rows are rounded to whole numbers up to `_LARGEST` of a row's largest magnitude. For numbers of a normal distribution
        that is 8 times finer than bfloat16; for a row of zeros but one number, whose others it loses, it does not matter.
        """
        # Not finite in, not finite out: the unit is then infinite or NaN.
        unit = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp(min=2.0**-100) * (1 / _LARGEST)
        in_bases = rows / (unit * _BASE)
        high = torch.round(in_bases)
        sums = self._exact(torch.cat([high, (in_bases - high) * _BASE]))  # it rounds the lower digits itself
        high, low = sums.split(rows.shape[0])
        return torch.add(low, high, alpha=_BASE) * (scales[:, 0] * unit)

    def _exact(self, digits: torch.Tensor) -> torch.Tensor:
        """Numbers from -64 to 63 `[m, in]`, rounded to whole ones, times the codes transposed, summed without rounding."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        out = [multiply(digits, 1.0, _ZERO, piece) for piece in self.pieces]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


class _Engine:
    """PyTorch's engine of quantized products, as it was before the first of several threads entered."""

    lock = threading.Lock()
    users = 0
    before = ""


@contextlib.contextmanager
def _fbgemm() -> Iterator[None]:
    """A context in which PyTorch, whose setting is one for the whole process, packs for FBGEMM."""
    with _Engine.lock:
        if not _Engine.users:
            _Engine.before = torch.backends.quantized.engine
            torch.backends.quantized.engine = "fbgemm"
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*", module="keras_gemma2")
        _Engine.users += 1
    try:
        yield
    finally:
        with _Engine.lock:
            _Engine.users -= 1
            if not _Engine.users:
                torch.backends.quantized.engine = _Engine.before


def _prepacked(codes: torch.Tensor) -> Any:
    return torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(codes, 1.0, 0), None)


@functools.cache
def _has_fbgemm() -> bool:
    names = ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    made = hasattr(torch, "_make_per_tensor_quantized_tensor") and all(hasattr(torch.ops.quantized, name) for name in names)
    return made and "fbgemm" in torch.backends.quantized.supported_engines
