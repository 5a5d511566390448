"""int8 codes in the order in which FBGEMM reads them, and its product with rows of floats.

FBGEMM's 8-bit products are exact for left sides of 7 bits: their sums of two products fit in 16 bits (AVX2's vpmaddubsw saturates).
Rows of floats are written in base 128 with such digits, each digit a row of its own.
"""

from __future__ import annotations

import concurrent.futures
import functools
import warnings
from typing import Any

import torch

FEW_ROWS = 8
ROWS_A_PIECE = 1 << 14  # packing takes the memory of a piece besides; smaller pieces are slower to multiply
ELEMENTS_A_PIECE = 1 << 22  # at least; packing runs on as many threads as there are pieces
_BASE, _ZERO = 128, 64
_LIMITS = {3: 1_040_000.0, 2: 8_100.0}  # what so many digits between -64 and 63 can write, either sign
_FAR_OUT = 30.0  # from here on, a row's largest magnitude over its root mean square asks for three digits


class PackedInt8:
    """A packed matrix of int8 codes `[out, in]`."""

    def __init__(self, codes: torch.Tensor) -> None:
        threads = torch.get_num_threads()
        least = ELEMENTS_A_PIECE // codes.shape[1]
        size = min(ROWS_A_PIECE, max(1, least, -(-codes.shape[0] // threads)))
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
                warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
                self.pieces = list(pool.map(_prepacked, codes.split(size)))
        finally:
            torch.backends.quantized.engine = engine

    def unpacked(self) -> torch.Tensor:
        """The codes in plain order."""
        return torch.cat([piece.unpack()[0].int_repr() for piece in self.pieces])

    @staticmethod
    def takes(codes: torch.Tensor) -> bool:
        """Whether there is a packed form; of what it is made of in PyTorch, some is announced to go."""
        return codes.dtype == torch.int8 and _has_fbgemm()

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 `rows [n, in]` times the matrix transposed: float32 `[n, out]`, with an error below that of rows in bfloat16.

        A few rows take three digits, with which nothing is lost in float32; it costs them no time. More rows take two, but for
        those with numbers so far out that bfloat16 would lose less of the others.
        """
        if rows.shape[0] <= FEW_ROWS:
            return self._in_digits(rows, 3).mul_(scales[:, 0])
        out = self._in_digits(rows, 2)
        largest = rows.abs().amax(1)
        far_out = (largest > _FAR_OUT * rows.square().mean(1).sqrt()).nonzero()[:, 0]
        if far_out.numel():
            out[far_out] = self._in_digits(rows[far_out], 3)
        return out.mul_(scales[:, 0])

    def _in_digits(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        # Not finite in, not finite out: the scale is then infinite or NaN.
        scales = rows.abs().amax(1, keepdim=True).clamp_(min=2.0**-100) / _LIMITS[count]
        whole = torch.round(rows / scales)
        digits = []
        for power in range(count - 1, 0, -1):
            digit = torch.round(whole / _BASE**power)
            whole = whole - digit * _BASE**power
            digits.append(digit)
        sums = self._exact(torch.cat([*digits, whole])).view(count, *rows.shape[:1], -1)
        out = sums[0]
        for lower in sums[1:]:
            out = torch.add(lower, out, alpha=_BASE)
        return out.mul_(scales)

    def _exact(self, digits: torch.Tensor) -> torch.Tensor:
        """Whole numbers from -64 to 63 `[m, in]` times the codes transposed, summed without rounding."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        out = [multiply(digits, 1.0, _ZERO, piece) for piece in self.pieces]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _prepacked(codes: torch.Tensor) -> Any:
    return torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(codes, 1.0, 0), None)


@functools.cache
def _has_fbgemm() -> bool:
    names = ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    made = hasattr(torch, "_make_per_tensor_quantized_tensor") and all(hasattr(torch.ops.quantized, name) for name in names)
    return made and "fbgemm" in torch.backends.quantized.supported_engines
