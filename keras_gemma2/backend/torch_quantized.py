"""Products with quantized weights on PyTorch.

On CPU, int8 products with a few rows run on a packed form of the codes (torch_packed.py). Everywhere else weights are
widened a block of rows at a time, so that a block stays in cache and beside the codes nothing of the weights' size is ever in
memory, in the backward pass neither.
"""

from __future__ import annotations

from typing import Any

import torch

from keras_gemma2.backend.torch_packed import packed_codes, plain
from keras_gemma2.backend.torch_products import float32_product, row_blocks


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1]).float()
    out = _packed_product(rows, codes, scales, mode)
    if out is None and torch.compiler.is_exporting():  # compilers of other runtimes know the codes by this, and blocks hide them
        out = torch.nn.functional.linear(rows, dequantized(codes, scales, mode))
    elif out is None:
        # Another tensor of the same memory, which stays whole if another thread packs the parameter meanwhile.
        out = _Widened.apply(rows, plain(codes).detach(), scales, mode)
    return out.reshape(*x.shape[:-1], codes.shape[0])


def _packed_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor | None:
    """The product on packed codes; None where there are none, or where autograd is to record it."""
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or not rows.shape[0]:
        return None
    if torch.is_grad_enabled() and rows.requires_grad:
        return None
    packed = packed_codes(codes, scales, mode)
    return None if packed is None else packed.product(rows, scales)


class _Widened(torch.autograd.Function):
    """The product in float32; its gradient widens again instead of keeping a wide copy of the weights."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.mode = mode
        out = rows.new_empty(rows.shape[0], codes.shape[0])
        for block in row_blocks(codes.shape[0], rows.shape[1]):
            out[:, block] = _product(rows, dequantized(codes[block], scales[block], mode))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        width = codes.shape[1] * (2 if ctx.mode == "int4" else 1)
        out = gradient.new_zeros(gradient.shape[0], width)
        for block in row_blocks(codes.shape[0], width):
            out.addmm_(gradient[:, block], dequantized(codes[block], scales[block], ctx.mode))
        return out, None, None, None


def _product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or not rows.shape[0]:
        return torch.nn.functional.linear(rows, weights)
    return float32_product(rows, weights)


def dequantized(codes: torch.Tensor, scales: torch.Tensor, mode: str) -> torch.Tensor:
    """Rows of a quantized matrix in float32."""
    if mode == "int8" and torch.onnx.is_in_onnx_export():  # an operation of its own, which runtimes do not compute when they load
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, scales[:, 0]), {"axis": 0}, dtype=torch.float32, shape=codes.shape
        )
    if mode == "int8":
        return codes.float() * scales
    halves = torch.stack([codes & 15, codes >> 4], dim=1)
    values = halves.reshape(*scales.shape, -1).float().sub_(8).mul_(scales[:, :, None])
    return values.reshape(codes.shape[0], -1)
