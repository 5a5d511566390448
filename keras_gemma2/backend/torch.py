"""PyTorch: products, blockwise construction, cache writes and inference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch
from keras.src.backend.common.variables import AutocastScope
from keras.src.backend.torch.core import get_device, to_torch_dtype

from keras_gemma2.backend import torch_packed, torch_products, torch_quantized, torch_tapes
from keras_gemma2.backend.memory import counted_peak, gather_rows  # noqa: F401 - the first is a function of a backend
from keras_gemma2.backend.not_spread import (  # noqa: F401 - of a backend
    check_alike,
    empty_cache,
    is_spread,
    local_groups,
    own_region,
    stored_like,
    together,
    whole_array,
    writing,
)
from keras_gemma2.backend.torch_frozen_loss import FROZEN_CHUNKS, frozen_sums_in_chunks  # noqa: F401 - two of the names of a backend
from keras_gemma2.backend.torch_gated import gated_gelu  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.torch_loss import label_terms, sums_in_chunks  # noqa: F401 - two of the functions of a backend
from keras_gemma2.backend.torch_recompute import recomputed  # noqa: F401 - one of the names of a backend
from keras_gemma2.backend.torch_steps import CompilesSteps  # noqa: F401 - one of the names of a backend


def linear(x: torch.Tensor, kernel: Any, dtype: str, float32_output: bool = False) -> torch.Tensor:
    """`x [..., in]` times `kernel [out, in]` transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows.
        kernel: a variable or a tensor.
        dtype: what the kernel is used in.
        float32_output: whether to return float32. Where PyTorch sums in float32 but gives x's dtype (GPUs, and one row in bfloat16
            on CPU), the sums were rounded to it.
    """
    with AutocastScope(None):  # which would round a float32 kernel as a whole
        kernel = keras.ops.convert_to_tensor(kernel)
    return torch_products.product(x, kernel, to_torch_dtype(dtype), float32_output)


def quantized_linear(x: torch.Tensor, codes: Any, scales: Any, mode: str, float32_output: bool = False) -> torch.Tensor:
    """`x [..., in]` times a matrix kept in 8 or 4 bits, transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows. The product can be differentiated with respect to them.
        codes: a variable or a tensor; int8 `[out, in]`, or for "int4" uint8 `[out, in / 2]` (see `quantization.py`).
        scales: a variable or a tensor; float32 `[out, 1]`, or for "int4" `[out, in / group]`.
        mode: "int8" or "int4".
        float32_output: whether to return the sums in float32.
    """
    codes, scales = (v.value if isinstance(v, keras.Variable) else keras.ops.convert_to_tensor(v) for v in (codes, scales))
    out = torch_quantized.product(x, codes, scales, mode)
    return out if float32_output else out.to(x.dtype)


def take_rows(table: Any, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a variable or tensor `[V, D]` at `indices [...]`: `[..., D]`, in the table's dtype."""
    if isinstance(table, keras.Variable) and not torch.compiler.is_compiling():
        torch_packed.keep_plain(table.value)
    return keras.ops.take(table, indices, axis=0)


def tensor_from_row_blocks(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor filled with consecutive blocks of rows, so that beside it only one block is in memory."""
    if get_device() == "cpu":
        return _from_numpy(gather_rows(blocks, shape, _numpy_dtype(dtype)))
    buffer, start = torch.empty(shape, dtype=to_torch_dtype(dtype), device=get_device()), 0
    for block in blocks:
        buffer[start : start + block.shape[0]].copy_(_from_numpy(block))
        start += block.shape[0]
    return buffer


def untouched_tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor of whatever was in memory, for a variable that is assigned next."""
    return torch.empty(shape, dtype=to_torch_dtype(dtype), device=get_device())


def assign_row_blocks(variable: keras.Variable, blocks: Iterable[np.ndarray], region: None = None) -> None:
    """Replaces a variable's value by consecutive blocks of rows; its old memory goes, where `assign` would copy into it."""
    variable.value.data = tensor_from_row_blocks(blocks, tuple(variable.shape), variable.dtype)
    torch_tapes.drop_all()


def release(variable: keras.Variable) -> None:
    """Frees the memory of a variable that a layer has given up; modules above it still list its parameter."""
    variable.value.data = torch.empty(0, dtype=variable.value.dtype, device=variable.value.device)
    torch_tapes.drop_all()


def track_variables(layer: keras.layers.Layer) -> None:
    """Lists a layer's variables as its parameters, after layers below it got others: a step sets the gradients of those to None."""
    layer._track_variables()
    torch_tapes.drop_all()


def _numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def numpy_row_blocks(tensor: torch.Tensor, rows: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows as numpy arrays; on CPU they are views."""
    return (_to_numpy(tensor[start : start + rows]) for start in range(0, tensor.shape[0], rows))


def _to_numpy(block: torch.Tensor) -> np.ndarray:
    block = block.detach().cpu()
    if block.dtype == torch.bfloat16:
        return block.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return block.numpy()


def _from_numpy(block: np.ndarray) -> torch.Tensor:
    if block.dtype.name == "bfloat16":  # numpy's bfloat16 comes from ml_dtypes, which torch does not know
        return torch.from_numpy(block.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(block)


def cache_dtype(compute_dtype: str) -> str:
    """The dtype in which keys and values are kept: the compute dtype."""
    return compute_dtype


def attention_dtype(compute_dtype: Any) -> str:
    """The dtype in which queries meet keys: bfloat16 on accelerators, else float32.

    CPUs have no fast half products, and sums of values overflow in float16.
    """
    is_bfloat16 = keras.backend.standardize_dtype(compute_dtype) == "bfloat16"
    return "bfloat16" if is_bfloat16 and get_device() != "cpu" else "float32"


def on_accelerator() -> bool:
    """Whether this process computes on something else than a CPU."""
    return get_device() != "cpu"


def write_slots(cache: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
    """Writes `values [b, K, T, H]` into `cache [B, K, S, H]` at `rows [b]` and `slots [b, T]`, in place.

    `rows` None are all in order.
    """
    rows = torch.arange(values.shape[0], device=values.device) if rows is None else rows
    if 0 in cache.stride():  # rows that share their memory, as those of several beams do at first
        cache = cache.clone(memory_format=torch.contiguous_format)
    # Advanced indices around a slice move to the front: the indexed view is [b, T, K, H].
    rows, slots = rows.long(), slots.long()  # ONNX, where this may be exported to, writes to no others
    cache[rows[:, None], :, slots] = values.transpose(1, 2).to(cache.dtype)
    return cache


def read_slots(cache: torch.Tensor, rows: torch.Tensor | None, start: Any, size: int) -> torch.Tensor:
    """Slots `start ... start + size` of `cache [B, K, S, H]`, of some rows `[b]` or of all: `[b, K, size, H]`."""
    block = cache.narrow(2, int(start), size)
    return block if rows is None else block[rows]


def write_rows(cache: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Writes `values [b, K, S, H]` into `cache [B, K, S, H]` at `rows [b]`, in place; for a row given twice the same."""
    return cache.index_copy_(0, rows.long(), values)


def attention_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The products of queries `[b, K, G, T, H]` and keys `[b, K, S, H]`: `[b, K, G, T, S]`."""
    return keras.ops.einsum("bkgth,bksh->bkgts", queries, keys)


def step_block() -> int:
    """Slots of a cache that a step of one token reads at a time: many, for each number of blocks is another tape."""
    return 1024


def is_asynchronous() -> bool:
    """Whether compiled functions return before they have computed what they give."""
    return on_accelerator()


def is_concrete(x: Any) -> bool:
    """Whether x holds values now, as opposed to standing for values in a traced function."""
    if torch.compiler.is_compiling():
        return False
    return not (isinstance(x, torch.Tensor) and x.is_meta)


def no_gradients() -> contextlib.AbstractContextManager:
    """A context in which autograd records nothing."""
    return torch.no_grad()


def with_gradient(forward: Callable, backward: Callable, *tensors: torch.Tensor) -> torch.Tensor:
    """A function with a backward pass of its own.

    Args:
        forward: gives, for the tensors, a tensor, and whatever `backward` needs (nested tensors).
        backward: gives, for these and the gradient of the tensor, a tuple of gradients with respect to the tensors, None for
            integers.
        tensors: the function's arguments.
    """
    return _WithGradient.apply(forward, backward, *tensors)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        value, kept = forward(*tensors)
        ctx.tree, ctx.gradients = keras.tree.map_structure(lambda _: None, kept), backward
        ctx.save_for_backward(*keras.tree.flatten(kept))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        kept = keras.tree.pack_sequence_as(ctx.tree, ctx.saved_tensors)
        return None, None, *ctx.gradients(kept, upstream)


def add_block(buffer: torch.Tensor, index: Any, block: torch.Tensor) -> torch.Tensor:
    """`buffer [n, ...]` with a `block [...]` added at an index, in place."""
    buffer[index].add_(block)
    return buffer


def compile_function(function: Callable, variables: list[keras.Variable], jit: bool | None = None) -> Callable:
    """Runs `function(donated, *args)` without recording gradients.

    Args:
        function: what it has `repeated` runs from tapes, which are kept from call to call.
        variables: what it reads.
        jit: True to compile the tapes with `torch.compile`, False to do without tapes.
    """
    tapes = None if jit is False else torch_tapes.Tapes(variables, is_compiled=bool(jit))

    def call(donated: Any, *args: Any) -> Any:
        torch_packed.pack_ahead(variables)
        # `torch.autocast` changes what an operation does without being one: it is not on a tape.
        is_taped = tapes is not None and not any(map(torch.is_autocast_enabled, {"cpu", get_device().partition(":")[0]} - {"meta"}))
        with torch.no_grad(), tapes.in_use() if is_taped else contextlib.nullcontext():
            return function(donated, *args)

    return call


def repeated(function: Callable, name: str) -> Callable:
    """A function of nested tensors, run many times, as fast as can be inside a compiled function.

    Args:
        function: its operations depend on the shapes of its arguments, and on values only where it looks at them. It may write to
            tensors, but must be safe to start again from its beginning.
        name: tells it from others that a compiled function repeats.
    """
    return torch_tapes.repeated(function, name)
