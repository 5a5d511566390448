"""TensorFlow: products, blockwise construction, cache writes and compilation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gemma2.backend import tensorflow_blocks, tensorflow_graph, tensorflow_quantized, tensorflow_words
from keras_gemma2.backend.loss_terms import label_terms  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.memory import gather_rows, untouched
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
from keras_gemma2.backend.tensorflow_frozen_loss import FROZEN_CHUNKS, frozen_sums_in_chunks  # noqa: F401 - two of the names of a backend
from keras_gemma2.backend.tensorflow_gated import gated_gelu  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.tensorflow_loss import sums_in_chunks  # noqa: F401 - one of the functions of a backend
from keras_gemma2.backend.tensorflow_recompute import recomputed  # noqa: F401 - one of the names of a backend
from keras_gemma2.backend.tensorflow_steps import CompilesSteps  # noqa: F401 - one of the names of a backend


def linear(x: tf.Tensor, kernel: Any, dtype: str, float32_output: bool = False) -> tf.Tensor:
    """`x [..., in]` times `kernel [out, in]` transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows.
        kernel: a variable or a tensor.
        dtype: what the kernel is used in.
        float32_output: whether to return the sums in float32.
    """
    units, value = kernel.shape[0], tensorflow_words.value_of(kernel)
    # One large product of rows: a batched matmul with a shared right side would broadcast the kernel.
    rows = tf.reshape(x, (-1, kernel.shape[1]))
    if value is not None and dtype == "bfloat16":
        out = tensorflow_words.dot(tf.cast(rows, tf.bfloat16), value, tf.float32)
    else:
        parts = tensorflow_graph.parts_of(kernel)
        one = functools.partial(_product, dtype=dtype)
        out = one(rows, kernel) if len(parts) == 1 else tensorflow_graph.joined_product(rows, parts, one)
    sizes = list(x.shape[:-1])
    if sizes.count(None) > 1:
        out = tf.reshape(out, tf.concat([tf.shape(x)[:-1], [units]], axis=0))
        out.set_shape([*sizes, units])
    else:
        out = tf.reshape(out, [*(-1 if size is None else size for size in sizes), units])
    return tf.cast(out, tf.float32 if float32_output else x.dtype)


def _product(rows: tf.Tensor, kernel: Any, dtype: str) -> tf.Tensor:
    kernel = tf.convert_to_tensor(keras.ops.convert_to_tensor(kernel, dtype=dtype))  # Keras leaves a variable one
    half = kernel.dtype in (tf.bfloat16, tf.float16) and not tf.config.list_logical_devices("GPU")
    return _linear_in_blocks(rows, kernel) if half else tensorflow_graph.product(rows, kernel)


@tf.custom_gradient
def _linear_in_blocks(rows: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The product in float32, a block of the half-precision kernel's rows at a time; differentiable in both."""

    def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        to_kernel = tf.matmul(upstream, tf.cast(rows, tf.float32), transpose_a=True)
        to_rows = tensorflow_blocks.gradient_in_blocks(upstream, (kernel,), _widened)
        return tf.cast(to_rows, rows.dtype), tf.cast(to_kernel, kernel.dtype)

    return tensorflow_blocks.product_in_blocks(rows, (kernel,), _widened), gradients


def _widened(kernel: tf.Tensor) -> list[tf.Tensor]:
    return [tf.cast(kernel, tf.float32)]


def quantized_linear(x: tf.Tensor, codes: Any, scales: Any, mode: str, float32_output: bool = False) -> tf.Tensor:
    """`x [..., in]` times a matrix kept in 8 or 4 bits, transposed: `[..., out]`, in float32 if asked for, else in x's dtype.

    Args:
        x: the rows. The product can be differentiated with respect to them.
        codes: a variable or a tensor; int8 `[out, in]`, or for "int4" uint8 `[out, in / 2]` (see `keras_gemma2/quantization.py`).
        scales: a variable or a tensor; float32 `[out, 1]`, or for "int4" `[out, in / group]`.
        mode: "int8" or "int4".
        float32_output: whether to return the sums in float32.
    """
    out = tensorflow_quantized.product(x, keras.ops.convert_to_tensor(codes), keras.ops.convert_to_tensor(scales), mode)
    return tf.cast(out, tf.float32 if float32_output else x.dtype)


def take_rows(table: Any, indices: tf.Tensor) -> tf.Tensor:
    """Rows of a variable or tensor `[V, D]` at `indices [...]`: `[..., D]`, in the table's dtype or a wider one."""
    words, parts = tensorflow_words.words_of(table), tensorflow_graph.parts_of(table)
    if len(parts) > 1:
        # Of tensors: a variable of which rows are taken is copied from then on whenever it is read as a whole.
        parts = [tf.convert_to_tensor(part) for part in parts]
        return tf.compat.v1.nn.embedding_lookup(parts, indices, partition_strategy="div")
    return keras.ops.take(table, indices, axis=0) if words is None else tensorflow_words.widened(tf.gather(words, indices))


def tensor_from_row_blocks(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    """A tensor filled with consecutive blocks of rows, so that beside it only one block is in memory.

    The rows are gathered in one aligned array, whose memory TensorFlow takes over by DLPack. numpy has no DLPack for
    bfloat16; the same bits as uint16 have.
    """
    return _adopt(gather_rows(blocks, shape, tf.as_dtype(dtype).as_numpy_dtype))


def _adopt(array: np.ndarray) -> tf.Tensor:
    """An aligned array as a tensor of the same memory."""
    if array.dtype.name != "bfloat16":
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.uint16).__dlpack__()), tf.bfloat16)


def untouched_tensor(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    """A tensor of whatever was in memory, for a variable that is assigned next; it takes no memory yet."""
    return _adopt(untouched(shape, tf.as_dtype(dtype).as_numpy_dtype))


def assign_row_blocks(variable: keras.Variable, blocks: Iterable[np.ndarray], region: None = None) -> None:
    """Replaces a variable's value by consecutive blocks of rows."""
    variable.assign(tensor_from_row_blocks(blocks, tuple(variable.shape), variable.dtype))


def release(variable: keras.Variable) -> None:
    """Nothing to do: the memory of a variable that a layer has given up goes with the variable."""


def track_variables(layer: keras.layers.Layer) -> None:
    """Nothing to do: what a layer's variables are is asked for each time."""


def numpy_row_blocks(tensor: tf.Tensor, rows: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows as numpy arrays."""
    return (tensor[start : start + rows].numpy() for start in range(0, tensor.shape[0], rows))


def cache_dtype(compute_dtype: str) -> str:
    """The dtype in which keys and values are kept: the compute dtype."""
    return compute_dtype


def attention_dtype(compute_dtype: str) -> str:
    """The dtype in which queries meet keys: bfloat16 on accelerators, else float32.

    CPUs have no fast half products, and sums of values overflow in float16.
    """
    is_bfloat16 = keras.backend.standardize_dtype(compute_dtype) == "bfloat16"
    return "bfloat16" if is_bfloat16 and tf.config.list_logical_devices("GPU") else "float32"


def on_accelerator() -> bool:
    """Whether this process computes on something else than a CPU."""
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def write_slots(cache: tf.Tensor, values: tf.Tensor, rows: tf.Tensor | None, slots: tf.Tensor) -> tf.Tensor:
    """Writes `values [b, K, T, H]` into `cache [B, K, S, H]` at `rows [b]` and `slots [b, T]`; in a loop, in place.

    `rows` None are all in order.
    """
    batch, heads, steps = tf.shape(values)[0], tf.shape(values)[1], tf.shape(values)[2]
    rows = tf.range(batch) if rows is None else rows
    row = tf.broadcast_to(tf.cast(rows, tf.int32)[:, None, None], (batch, heads, steps))
    head = tf.broadcast_to(tf.range(heads)[None, :, None], (batch, heads, steps))
    slot = tf.broadcast_to(tf.cast(slots, tf.int32)[:, None, :], (batch, heads, steps))
    return tf.tensor_scatter_nd_update(cache, tf.stack([row, head, slot], axis=-1), tf.cast(values, cache.dtype))


def read_slots(cache: tf.Tensor, rows: tf.Tensor | None, start: Any, size: int) -> tf.Tensor:
    """Slots `start ... start + size` of `cache [B, K, S, H]`, of some rows `[b]` or of all: `[b, K, size, H]`."""
    # `tf.slice`, whose size is static: XLA cannot tell that `start : start + size` is as long wherever it starts.
    block = tf.slice(cache, (0, 0, start, 0), (tf.shape(cache)[0], cache.shape[1], size, cache.shape[3]))
    return block if rows is None else tf.gather(block, rows)


def write_rows(cache: tf.Tensor, values: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """`cache [B, K, S, H]` with `values [b, K, S, H]` at `rows [b]`; those at a row given twice must be the same."""
    return tf.tensor_scatter_nd_update(cache, rows[:, None], values)


def attention_scores(queries: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """The products of queries `[b, K, G, T, H]` and keys `[b, K, S, H]`: `[b, K, G, T, S]`."""
    return keras.ops.einsum("bkgth,bksh->bkgts", queries, keys)


def step_block() -> int:
    """Slots of a cache that a step of one token reads at a time.

    Few, so that little is read that nothing is in yet; on accelerators many, for how often a loop runs is asked from the host.
    """
    return 1024 if on_accelerator() else 128


def is_asynchronous() -> bool:
    """Whether compiled functions return before they have computed what they give."""
    return on_accelerator()


def is_concrete(x: Any) -> bool:
    """Whether x holds values now, as opposed to standing for values in a traced function."""
    return not isinstance(x, tf.Tensor) or hasattr(x, "numpy")


def no_gradients() -> contextlib.AbstractContextManager:
    """TensorFlow records nothing outside a GradientTape: an empty context."""
    return contextlib.nullcontext()


def with_gradient(forward: Callable, backward: Callable, *tensors: tf.Tensor) -> tf.Tensor:
    """A function with a backward pass of its own.

    Args:
        forward: gives, for the tensors, a tensor, and whatever `backward` needs (nested tensors).
        backward: gives, for these and the gradient of the tensor, a tuple of gradients with respect to the tensors, None for
            integers.
        tensors: the function's arguments.
    """

    @tf.custom_gradient
    def function(*tensors: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        value, kept = forward(*tensors)

        def gradient(upstream: tf.Tensor) -> tuple:
            # What does not depend on the gradient, the rounds of a loop among it, would be computed as soon as `kept` is there, and
            # be in memory until the gradient comes.
            with tf.control_dependencies([upstream]):
                return backward(kept, upstream)

        return value, gradient

    return function(*tensors)


def add_block(buffer: tf.Tensor, index: Any, block: tf.Tensor) -> tf.Tensor:
    """`buffer [n, ...]` with a `block [...]` added at an index; in place inside a loop."""
    return tf.tensor_scatter_nd_add(buffer, [[index]], block[None])


def compile_function(function: Callable, variables: list[keras.Variable], jit: bool | None = None) -> Callable:
    """Compiles `function(donated, *args)` with XLA, once a set of argument shapes.

    TensorFlow's own executor would copy a cache in each step of a loop that writes to it, and its product of a few rows is
    four times slower.

    `jit` is PyTorch's: here there is nothing to choose.
    """
    del jit
    kept = tensorflow_words.kept_as_words(variables)  # the others are captured by the graph

    def in_scope(tensors: list[tuple[tf.Tensor, tf.Tensor]], donated: Any, *args: Any) -> Any:
        with tensorflow_words.xla_scope(kept, tensors):
            return function(donated, *args)

    compiled = tf.function(in_scope, autograph=False, jit_compile=True)

    def call(donated: Any, *args: Any) -> Any:
        # Words made outside of what XLA compiles: there they would not stop XLA from widening the variable as a whole.
        return compiled([tensorflow_words.with_words(variable) for variable in kept], donated, *args)

    return tf.function(call, autograph=False)


def repeated(function: Callable, name: str) -> Callable:
    """The function itself: inside a compiled function it is compiled with the rest."""
    del name
    return function


def counted_peak(function: Callable[[], Any]) -> int | None:
    """Bytes that a call holds at its peak beside what is there after it, on the first device; see `backend/memory.py`.

    Where TensorFlow has a pool it counts, and gives nothing back to the system, so that resident memory does not tell. It has none
    on CPUs where it does without oneDNN, which are those without AVX-512: None.
    """
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
    try:
        tf.config.experimental.reset_memory_stats(device)
    except ValueError:  # an allocator that does not count
        return None
    function()
    found = tf.config.experimental.get_memory_info(device)
    return found["peak"] - found["current"]
