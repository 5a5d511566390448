"""bfloat16 weights on XLA's CPU backend, handed to compiled code as the 16-bit words they are: as jax_words.py, for TensorFlow."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

_IN_SCOPE: contextvars.ContextVar[dict[int, tf.Tensor]] = contextvars.ContextVar("words")


def kept_as_words(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Those of the variables that compiled code gets as words: the bfloat16 matrices, unless there is a GPU."""
    if tf.config.list_logical_devices("GPU"):
        return []
    return [variable for variable in variables if variable.dtype == "bfloat16" and len(variable.shape) == 2]


def as_words(variable: keras.Variable) -> tf.Tensor:
    """A bfloat16 variable's value as uint16, the same memory."""
    return tf.bitcast(tf.convert_to_tensor(variable.value), tf.uint16)


@contextlib.contextmanager
def words_scope(variables: list[keras.Variable], words: list[tf.Tensor]) -> Iterator[None]:
    """A context in which `words_of` finds the words of these variables."""
    token = _IN_SCOPE.set({id(variable): tensor for variable, tensor in zip(variables, words)})
    try:
        yield
    finally:
        _IN_SCOPE.reset(token)


def words_of(variable: Any) -> tf.Tensor | None:
    """The words of a variable's bfloat16 value in the compiled function being traced, or None."""
    return _IN_SCOPE.get({}).get(id(variable))


def widened(words: tf.Tensor) -> tf.Tensor:
    """float32, of which bfloat16 is the upper half."""
    return tf.bitcast(tf.bitwise.left_shift(tf.cast(words, tf.uint32), tf.constant(16, tf.uint32)), tf.float32)
