"""Products with float weights on PyTorch, each number of rows by its fastest way.

PyTorch's own `linear` on CPU is slow in two cases. In float32 with a few rows, MKL reads the weights two to three times slower than
the memory allows, and oneDNN does not; PyTorch offers it to its compiler as `mkldnn::_linear_pointwise`. In 16 bits with more than
a few rows, on CPUs without instructions for them, it is seven times slower than in float32: there, blocks of rows of the kernel
are widened, small enough to stay in cache. The limits are where the ways cross on 2 cores of an AMD EPYC (AVX2).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

ONEDNN_ROWS = 31  # up to here oneDNN; above, MKL on the transposed product
TRANSPOSED_ROWS = 256
UNWIDENED_ROWS = 3
ELEMENTS_A_BLOCK = 1 << 20  # 4 MiB of float32


def product(x: torch.Tensor, kernel: torch.Tensor, dtype: torch.dtype, float32_output: bool) -> torch.Tensor:
    """`x [..., in]` times `kernel [out, in]`, rounded to `dtype`, transposed: `[..., out]`, in float32 if asked for.

    On other devices than CPUs, and for one row in bfloat16, sums are kept in float32 but leave rounded to `dtype`.
    """
    rows = x.reshape(-1, x.shape[-1])
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling() and rows.shape[0] > 0
    if on_cpu and x.dtype == kernel.dtype == dtype == torch.float32:
        out = float32_product(rows, kernel, torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad))
    elif on_cpu and _is_widened(rows.shape[0], kernel.dtype, dtype, float32_output):
        out = _Widened.apply(rows, kernel, dtype)
    else:
        out = _plain_product(rows.to(dtype), kernel.to(dtype))
    return out.to(torch.float32 if float32_output else x.dtype).reshape(*x.shape[:-1], kernel.shape[0])


def _plain_product(rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    if rows.device.type == "cpu" and rows.shape[0] == 1:
        return torch.mv(kernel, rows[0])[None]  # a little faster
    return torch.nn.functional.linear(rows, kernel)


def float32_product(rows: torch.Tensor, kernel: torch.Tensor, recorded: bool = False) -> torch.Tensor:
    """`rows [n, in]` times `kernel [out, in]` transposed, both float32 on CPU.

    Args:
        rows: the left side.
        kernel: the right side.
        recorded: whether autograd is to record the product, which it cannot for oneDNN's.
    """
    count = rows.shape[0]
    if count <= ONEDNN_ROWS and not recorded and kernel.is_contiguous() and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(rows, kernel, None, "none", [], "")
    if 1 < count <= TRANSPOSED_ROWS:
        return (kernel @ rows.T).T.contiguous()
    return torch.nn.functional.linear(rows, kernel)


def onednn_product(rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`rows [n, in]` times `kernel [out, in]` transposed, both float32; oneDNN's on CPUs, and not recorded by autograd there."""
    if rows.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(rows, kernel, None, "none", [], "")
    return torch.nn.functional.linear(rows, kernel)


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, each of a size that stays in cache in float32."""
    step = max(1, ELEMENTS_A_BLOCK // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _is_widened(count: int, kernel_dtype: torch.dtype, dtype: torch.dtype, float32_output: bool) -> bool:
    """Whether to widen blocks of the kernel.

    That is where the sums are wanted in float32, but for one row in bfloat16: a token's logits would take twice the time. On a CPU
    without instructions for the dtype it is also for many rows, and where a kernel in float32 would be rounded as a whole.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if float32_output and (count > 1 or dtype == torch.float16):
        return True  # a CPU's own product in 16 bits gives its sums rounded to them
    if _has_instructions_for(dtype):
        return False
    return count > UNWIDENED_ROWS or kernel_dtype != dtype


class _Widened(torch.autograd.Function):
    """A product in 16 bits done in float32; gradients widen the kernel again instead of keeping a wide copy."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, kernel: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.dtype = dtype
        wide = rows.to(dtype).float()
        out = wide.new_empty(rows.shape[0], kernel.shape[0])
        for block in row_blocks(*kernel.shape):
            out[:, block] = float32_product(wide, kernel[block].to(dtype).float())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        gradient = gradient.float()
        for_rows = gradient.new_zeros(rows.shape) if ctx.needs_input_grad[0] else None
        for_kernel = torch.empty_like(kernel) if ctx.needs_input_grad[1] else None
        wide = rows.to(ctx.dtype).float() if for_kernel is not None else None
        for block in row_blocks(*kernel.shape):
            if for_rows is not None:
                for_rows.addmm_(gradient[:, block], kernel[block].to(ctx.dtype).float())
            if for_kernel is not None:
                for_kernel[block] = gradient[:, block].T @ wide
        return None if for_rows is None else for_rows.to(rows.dtype), for_kernel, None


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies numbers of a 16-bit type itself. An unknown answer counts as no: float32 is fast everywhere."""
    names = {torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), torch.float16: ("_is_amx_fp16_supported",)}
    return any(getattr(torch.cpu, name, lambda: False)() for name in names[dtype])
