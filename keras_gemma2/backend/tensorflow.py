"""TensorFlow: products, blockwise construction, cache writes and compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gemma2.backend.memory import gather_rows


def linear(x: tf.Tensor, kernel: tf.Tensor, float32_output: bool = False) -> tf.Tensor:
    """`x [..., in]` times `kernel [out, in]` transposed: `[..., out]`, in float32 if asked for, else in x's dtype."""
    # One large product of rows: a batched matmul with a shared right side would broadcast the kernel.
    rows = tf.reshape(x, (-1, kernel.shape[1]))
    out = tf.matmul(rows, kernel, transpose_b=True)
    out = tf.reshape(out, tf.concat([tf.shape(x)[:-1], [kernel.shape[0]]], axis=0))
    out.set_shape(x.shape[:-1].concatenate(kernel.shape[0]))
    return tf.cast(out, tf.float32) if float32_output else out


def tensor_from_row_blocks(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    """A tensor filled with consecutive blocks of rows, so that beside it only one block is in memory.

    The rows are gathered in one aligned array, whose memory TensorFlow takes over by DLPack. numpy has no DLPack for
    bfloat16; the same bits as uint16 have.
    """
    dtype = tf.as_dtype(dtype)
    array = gather_rows(blocks, shape, dtype.as_numpy_dtype)
    if dtype != tf.bfloat16:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.uint16).__dlpack__()), dtype)


def numpy_row_blocks(tensor: tf.Tensor, rows: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows as numpy arrays."""
    return (tensor[start : start + rows].numpy() for start in range(0, tensor.shape[0], rows))


def write_slots(cache: tf.Tensor, values: tf.Tensor, slots: tf.Tensor) -> tf.Tensor:
    """Writes `values [B, K, T, H]` into `cache [B, K, S, H]` at `slots [B, T]`."""
    batch, heads, steps = tf.shape(values)[0], tf.shape(values)[1], tf.shape(values)[2]
    grid = tf.meshgrid(tf.range(batch), tf.range(heads), tf.range(steps), indexing="ij")
    slot = tf.broadcast_to(tf.cast(slots, tf.int32)[:, None, :], (batch, heads, steps))
    indices = tf.stack([grid[0], grid[1], slot], axis=-1)
    return tf.tensor_scatter_nd_update(cache, indices, values)


def is_concrete(x: Any) -> bool:
    """Whether x holds values now, as opposed to standing for values in a traced function."""
    return not isinstance(x, tf.Tensor) or hasattr(x, "numpy")


def no_gradients() -> contextlib.AbstractContextManager:
    """TensorFlow records nothing outside a GradientTape: an empty context."""
    return contextlib.nullcontext()


def compile_function(function: Callable, variables: list[keras.Variable]) -> Callable:
    """Compiles `function(donated, *args)` into a graph; one graph a set of argument shapes."""
    del variables  # captured by the graph
    return tf.function(function, autograph=False)
