"""PyTorch: the gated activation of a feed-forward layer, with little memory in its backward pass."""

from __future__ import annotations

from typing import Any

import torch

from keras_gemma2.backend.torch_products import row_blocks


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu_tanh(gate) * up`, of which gate and up alone are kept until the backward pass.

    They are the widest tensors of a block. Gradients are made a block of rows at a time, without other tensors of their size.

    Args:
        gate: `[..., F]`.
        up: of the same shape and dtype.
    """
    return _GatedGelu.apply(gate, up)


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, width = upstream.shape, upstream.shape[-1]
        gate, up, upstream = (tensor.reshape(-1, width) for tensor in (*ctx.saved_tensors, upstream))
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        for rows in row_blocks(len(gate), width):
            torch.mul(upstream[rows], torch.nn.functional.gelu(gate[rows], approximate="tanh"), out=to_up[rows])
            to_gate[rows] = torch.ops.aten.gelu_backward(upstream[rows] * up[rows], gate[rows], approximate="tanh")
        return to_gate.reshape(shape), to_up.reshape(shape)
