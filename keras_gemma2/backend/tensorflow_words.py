"""What XLA's CPU compiler is fast at: products of 16-bit and of 8-bit numbers, and rows of bfloat16 tables taken as 16-bit words.

As jax_words.py, for TensorFlow, whose own products of such numbers are slow: only inside what XLA compiles.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

_IN_SCOPE: contextvars.ContextVar[dict[int, tuple[tf.Tensor, tf.Tensor]] | None] = contextvars.ContextVar("words", default=None)


def kept_as_words(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Those of the variables that compiled code gets as words, too: the bfloat16 matrices, unless there is a GPU."""
    if tf.config.list_logical_devices("GPU"):
        return []
    return [variable for variable in variables if variable.dtype == "bfloat16" and len(variable.shape) == 2]


def with_words(variable: keras.Variable) -> tuple[tf.Tensor, tf.Tensor]:
    """A bfloat16 variable's value, and the same memory as uint16."""
    value = tf.convert_to_tensor(variable.value)
    return value, tf.bitcast(value, tf.uint16)


@contextlib.contextmanager
def xla_scope(variables: list[keras.Variable], tensors: list[tuple[tf.Tensor, tf.Tensor]]) -> Iterator[None]:
    """A context for what XLA compiles for a CPU or a GPU, in which `value_of` and `words_of` know these variables."""
    token = _IN_SCOPE.set({id(variable): pair for variable, pair in zip(variables, tensors)})
    try:
        yield
    finally:
        _IN_SCOPE.reset(token)


def is_xla_on_cpu() -> bool:
    """Whether what is being traced is compiled by XLA for a CPU."""
    return _IN_SCOPE.get() is not None and not tf.config.list_logical_devices("GPU")


def value_of(variable: Any) -> tf.Tensor | None:
    """A variable's bfloat16 value in the compiled function being traced, or None."""
    return (_IN_SCOPE.get() or {}).get(id(variable), (None, None))[0]


def words_of(variable: Any) -> tf.Tensor | None:
    """The words of that value, or None."""
    return (_IN_SCOPE.get() or {}).get(id(variable), (None, None))[1]


def dot(rows: tf.Tensor, matrix: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`rows [R, in]` times `matrix [out, in]` transposed, summed in `dtype`; inside what XLA compiles.

    Fast for bfloat16 summed in float32 and for int8 summed in int32.
    """
    if rows.shape[0] == 1:  # for which XLA would widen the matrix as a whole first
        rows = tf.concat([rows, rows], axis=0)
        return tf.raw_ops.BatchMatMulV3(x=rows, y=matrix, Tout=dtype, adj_y=True)[:1]
    return tf.raw_ops.BatchMatMulV3(x=rows, y=matrix, Tout=dtype, adj_y=True)


def widened(words: tf.Tensor) -> tf.Tensor:
    """float32, of which bfloat16 is the upper half."""
    return tf.bitcast(tf.bitwise.left_shift(tf.cast(words, tf.uint32), tf.constant(16, tf.uint32)), tf.float32)
