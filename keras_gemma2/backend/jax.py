"""JAX: products, blockwise construction, cache writes and compilation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_gemma2.backend import jax_quantized, jax_spread, jax_words
from keras_gemma2.backend.jax_frozen_loss import FROZEN_CHUNKS, frozen_sums_in_chunks  # noqa: F401 - two of the names of a backend
from keras_gemma2.backend.jax_gated import gated_gelu  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.jax_loss import sums_in_chunks  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.jax_recompute import recomputed  # noqa: F401 - one of the names of a backend
from keras_gemma2.backend.jax_spread import (  # noqa: F401 - of a backend
    check_alike,
    empty_cache,
    is_spread,
    local_groups,
    own_region,
    stored_like,
    together,
    writing,
)
from keras_gemma2.backend.jax_steps import CompilesSteps  # noqa: F401 - one of the names of a backend
from keras_gemma2.backend.loss_terms import label_terms  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.memory import counted_peak, gather_rows, untouched  # noqa: F401 - the first is a function of a backend


def linear(x: jax.Array, kernel: Any, dtype: str, float32_output: bool = False) -> jax.Array:
    """`x [..., in]` times `kernel [out, in]` transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows.
        kernel: a variable or a tensor.
        dtype: what the kernel is used in.
        float32_output: whether to return the sums in float32.
    """
    out_dtype = jnp.float32 if float32_output else x.dtype
    words = None if jax_spread.is_spread() else jax_words.words_of(kernel)
    if words is not None and dtype != "bfloat16" and dtype in ("float32", keras.backend.standardize_dtype(kernel.dtype)):
        return jax_words.linear_in_blocks(x, words).astype(out_dtype)
    kernel = keras.ops.convert_to_tensor(kernel, dtype=dtype)
    rows = x.reshape(-1, x.shape[-1])
    sums_dtype = out_dtype
    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        # For any other dtype of sums, or for one row, XLA would widen the kernel as a whole first.
        sums_dtype, rows = jnp.float32, jnp.concatenate([rows, rows]) if rows.shape[0] == 1 else rows
    out = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=sums_dtype)
    return out[: x.size // x.shape[-1]].astype(out_dtype).reshape(*x.shape[:-1], kernel.shape[0])


def quantized_linear(x: jax.Array, codes: Any, scales: Any, mode: str, float32_output: bool = False) -> jax.Array:
    """`x [..., in]` times a matrix kept in 8 or 4 bits, transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows. The product can be differentiated with respect to them.
        codes: a variable or a tensor; int8 `[out, in]`, or for "int4" uint8 `[out, in / 2]` (see `keras_gemma2/quantization.py`).
        scales: a variable or a tensor; float32 `[out, 1]`, or for "int4" `[out, in / group]`.
        mode: "int8" or "int4".
        float32_output: whether to return the sums in float32.
    """
    arrays = keras.ops.convert_to_tensor(codes), keras.ops.convert_to_tensor(scales)
    out = jax_quantized.product(x, *arrays, mode, jax_spread.is_spread())
    return out.astype(jnp.float32 if float32_output else x.dtype)


def take_rows(table: Any, indices: jax.Array) -> jax.Array:
    """Rows of a variable or tensor `[V, D]` at `indices [...]`: `[..., D]`, in the table's dtype or a wider one."""
    words = jax_words.words_of(table)
    return jnp.take(keras.ops.convert_to_tensor(table), indices, axis=0) if words is None else jax_words.take_rows(words, indices)


def tensor_from_row_blocks(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> jax.Array:
    """A tensor filled with consecutive blocks of rows, so that beside it only one block is in memory.

    On CPU the rows are gathered in one aligned array, whose memory `jax.device_put` takes over; on other devices each
    block is written into a donated buffer there.
    """
    if jax.default_backend() == "cpu":
        return jax.device_put(gather_rows(blocks, shape, jnp.dtype(dtype)), jax.devices("cpu")[0])
    buffer, start = jnp.zeros(shape, dtype), 0
    for block in blocks:
        buffer = _write_rows(buffer, jnp.asarray(block, dtype), start)
        # Dispatch is asynchronous: without the wait, blocks queue up in host memory faster than they are written.
        buffer.block_until_ready()
        start += block.shape[0]
    return buffer


def whole_array(variable: keras.Variable) -> np.ndarray:
    """A variable's value, of whichever devices, as a numpy array."""
    return jax_spread.gathered(variable.value)


def numpy_row_blocks(tensor: jax.Array, rows: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows as numpy arrays; on CPU they are views."""
    array = jax_spread.gathered(tensor)
    return (array[start : start + rows] for start in range(0, array.shape[0], rows))


def untouched_tensor(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """A tensor of whatever was in memory, for a variable that is assigned next; on CPU it takes no memory yet."""
    if jax.default_backend() == "cpu":
        return jax.device_put(untouched(shape, jnp.dtype(dtype)), jax.devices("cpu")[0])
    return jnp.empty(shape, dtype)


def assign_row_blocks(variable: keras.Variable, blocks: Iterable[np.ndarray], region: tuple[slice, ...] | None = None) -> None:
    """Replaces a variable's value by consecutive blocks of rows.

    Args:
        variable: to be assigned.
        blocks: of all of it, or of the part that `region` says.
        region: `own_region`, or its rows alone, a slice an axis; None for all.
    """
    shape, sharding = tuple(variable.shape), jax_spread.layout_of(variable)
    if sharding is None:
        variable.assign(tensor_from_row_blocks(blocks, shape, variable.dtype))
        return
    variable.assign(jax_spread.from_row_blocks(blocks, shape, variable.dtype, sharding, region, untouched))


def release(variable: keras.Variable) -> None:
    """Nothing to do: the memory of a variable that a layer has given up goes with the variable."""


def track_variables(layer: keras.layers.Layer) -> None:
    """Nothing to do: what a layer's variables are is asked for each time."""


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(buffer: jax.Array, block: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block, (start,) + (0,) * (buffer.ndim - 1))


def cache_dtype(compute_dtype: str) -> str:
    """The dtype in which keys and values are kept: the compute dtype, or on CPU, for bfloat16, the words of jax_words.py."""
    return "uint16" if compute_dtype == "bfloat16" and jax.default_backend() == "cpu" else compute_dtype


def attention_dtype(compute_dtype: str) -> str:
    """The dtype in which queries meet keys: bfloat16 on accelerators, else float32.

    CPUs have no fast half products, and sums of values overflow in float16.
    """
    is_bfloat16 = keras.backend.standardize_dtype(compute_dtype) == "bfloat16"
    return "bfloat16" if is_bfloat16 and jax.default_backend() != "cpu" else "float32"


def on_accelerator() -> bool:
    """Whether this process computes on something else than a CPU."""
    return jax.default_backend() != "cpu"


def write_slots(cache: jax.Array, values: jax.Array, rows: jax.Array | None, slots: jax.Array) -> jax.Array:
    """Writes `values [b, K, T, H]` into `cache [B, K, S, H]` at `rows [b]` and `slots [b, T]`; in place where it was donated.

    `rows` None are all in order.
    """
    if cache.dtype == jnp.uint16:
        values = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if rows is None and jax_spread.is_spread():  # row by row, which XLA sees to be each device's own
        write = jax.vmap(lambda row, new, some: row.at[:, some].set(new.astype(row.dtype)))
        return jax_spread.placed_cache(write(cache, values, slots))
    rows = jnp.arange(cache.shape[0]) if rows is None else rows
    # Advanced indices around a slice move to the front: the indexed view is [b, T, K, H].
    return cache.at[rows[:, None], :, slots].set(jnp.swapaxes(values, 1, 2).astype(cache.dtype))


def read_slots(cache: jax.Array, rows: jax.Array | None, start: Any, size: int) -> jax.Array:
    """Slots `start ... start + size` of `cache [B, K, S, H]`, of some rows `[b]` or of all: `[b, K, size, H]`."""
    block = jax.lax.dynamic_slice_in_dim(cache, start, size, axis=2)
    block = block if rows is None else block[rows]
    return jax_words.widened(block) if block.dtype == jnp.uint16 else block


def write_rows(cache: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes `values [b, K, S, H]` into `cache [B, K, S, H]` at `rows [b]`, one after the other; in place where it was donated."""
    for i in range(values.shape[0]):
        cache = jax.lax.dynamic_update_slice_in_dim(cache, values[i : i + 1], rows[i], axis=0)
    return cache


def attention_scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """The products of queries `[b, K, G, T, H]` and keys `[b, K, S, H]`: `[b, K, G, T, S]`."""
    if queries.shape[3] != 1 or on_accelerator():
        return jnp.einsum("bkgth,bksh->bkgts", queries, keys)
    # With the keys on the left: on CPUs half the time where there are many rows.
    return jnp.moveaxis(jnp.einsum("bksh,bkgth->bksgt", keys, queries), 2, -1)


def step_block() -> int:
    """Slots of a cache that a step of one token reads at a time.

    Few, so that little is read that nothing is in yet; on accelerators many, for how often a loop runs is asked from the host.
    """
    return 1024 if on_accelerator() else 128


def is_asynchronous() -> bool:
    """Whether compiled functions return before they have computed what they give."""
    return True


def is_concrete(x: Any) -> bool:
    """Whether x holds values now, as opposed to standing for values in a traced function."""
    return not isinstance(x, jax.core.Tracer)


def no_gradients() -> contextlib.AbstractContextManager:
    """JAX records nothing unless asked to: an empty context."""
    return contextlib.nullcontext()


def with_gradient(forward: Callable, backward: Callable, *tensors: jax.Array) -> jax.Array:
    """A function with a backward pass of its own.

    Args:
        forward: gives, for the tensors, a tensor, and whatever `backward` needs (nested tensors).
        backward: gives, for these and the gradient of the tensor, a tuple of gradients with respect to the tensors, None for
            integers.
        tensors: the function's arguments.
    """
    function = jax.custom_vjp(lambda *tensors: forward(*tensors)[0])
    function.defvjp(forward, backward)
    return function(*tensors)


def add_block(buffer: jax.Array, index: Any, block: jax.Array) -> jax.Array:
    """`buffer [n, ...]` with a `block [...]` added at an index; in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(buffer, buffer[index] + block, index, 0)


def compile_function(function: Callable, variables: list[keras.Variable], jit: bool | None = None) -> Callable:
    """Compiles `function(donated, *args)`, which reads `variables`; the first argument's buffers are reused for outputs.

    `jit` is PyTorch's: here there is nothing to choose.
    """
    del jit

    def stateless(values: list[jax.Array], words: list[jax.Array], donated: Any, *args: Any) -> Any:
        with jax_words.words_scope(variables, words), keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return jax_spread.laid_out(function(donated, *args))

    compiled = jax.jit(stateless, donate_argnums=2)

    def arguments(donated: Any, *args: Any) -> tuple:
        values = [variable.value for variable in variables]
        return values, [jax_words.as_words(value) for value in values], *jax_spread.arguments((donated, *args))

    def call(donated: Any, *args: Any) -> Any:
        return compiled(*arguments(donated, *args))

    call.lower = lambda donated, *args: compiled.lower(*arguments(donated, *args))  # to look at the program

    return call


def repeated(function: Callable, name: str) -> Callable:
    """The function itself: inside a compiled function it is compiled with the rest."""
    del name
    return function
