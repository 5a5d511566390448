"""Products with quantized weights on PyTorch.

The weights are dequantized a block of rows at a time, so that a block stays in cache and beside the codes nothing of the weights'
size is ever in memory, in the backward pass neither.
"""

from __future__ import annotations

from typing import Any

import torch

ELEMENTS_A_BLOCK = 1 << 19  # 2 MiB of float32


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return _Product.apply(rows, codes, scales, mode).reshape(*x.shape[:-1], codes.shape[0])


class _Product(torch.autograd.Function):
    """The product in float32; its gradient dequantizes again instead of keeping a wide copy of the weights."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.mode = mode
        out = rows.new_empty(rows.shape[0], codes.shape[0])
        for block in _blocks(codes.shape[0], rows.shape[1]):
            out[:, block] = rows @ dequantized(codes[block], scales[block], mode).T
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        width = codes.shape[1] * (2 if ctx.mode == "int4" else 1)
        out = gradient.new_zeros(gradient.shape[0], width)
        for block in _blocks(codes.shape[0], width):
            out.addmm_(gradient[:, block], dequantized(codes[block], scales[block], ctx.mode))
        return out, None, None, None


def dequantized(codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
    """Rows of a quantized matrix in float32."""
    if mode == "int8":
        return codes.float() * scales
    halves = torch.cat([codes & 15, codes >> 4], dim=1).float() - 8
    return (halves.reshape(*scales.shape, -1) * scales[:, :, None]).reshape(halves.shape)


def _blocks(rows: int, width: int) -> list[slice]:
    """The row blocks of a matrix."""
    step = max(1, ELEMENTS_A_BLOCK // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
