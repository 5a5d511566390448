"""bfloat16 weights on XLA's CPU backend, handed to compiled code as the 16-bit words they are.

XLA's CPU compiler widens a bfloat16 parameter to float32 as a whole, before anything else and slowly: for all weights at once, so
that a model takes three times its memory. The same memory seen as words is left alone; products then widen a block of
rows at a time, which stays in cache.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax

ELEMENTS_A_BLOCK = 1 << 19
_IN_SCOPE: contextvars.ContextVar[dict[int, jax.Array]] = contextvars.ContextVar("words")


def as_words(value: jax.Array) -> jax.Array:
    """A bfloat16 matrix on the CPU as uint16, the same memory; any other array as it is."""
    if not (value.ndim == 2 and value.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and len(value.devices()) == 1):
        return value
    return jax.device_put(np.asarray(value).view(np.uint16))


def as_value(array: jax.Array, dtype: Any) -> jax.Array:
    """What `as_words` was given, inside compiled code."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


@contextlib.contextmanager
def words_scope(variables: list[keras.Variable], arrays: list[jax.Array]) -> Iterator[None]:
    """A context in which `words_of` finds the words of these variables."""
    token = _IN_SCOPE.set({id(v): a for v, a in zip(variables, arrays) if a.dtype == jnp.uint16})
    try:
        yield
    finally:
        _IN_SCOPE.reset(token)


def words_of(variable: Any) -> jax.Array | None:
    """The words of a variable's bfloat16 value in the compiled function being traced, or None."""
    return _IN_SCOPE.get({}).get(id(variable))


def linear_in_blocks(x: jax.Array, words: jax.Array) -> jax.Array:
    """`x [..., in]` times the bfloat16 matrix of `words [out, in]` transposed: float32 `[..., out]`."""
    rows = max(1, min(words.shape[0], ELEMENTS_A_BLOCK // words.shape[1]))
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def product(start: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(words, start, rows, 0)
        return lax.dot_general(wide, widened(block), (((1,), (1,)), ((), ())))

    whole = words.shape[0] // rows
    out = jnp.moveaxis(lax.map(product, jnp.arange(whole) * rows), 0, 1).reshape(wide.shape[0], -1)
    rest = words.shape[0] - whole * rows
    if rest:
        out = jnp.concatenate([out, product(words.shape[0] - rows)[:, -rest:]], axis=1)
    return out.reshape(*x.shape[:-1], words.shape[0])


def take_rows(words: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of the bfloat16 matrix of `words`, in float32, which holds them exactly."""
    return widened(jnp.take(words, indices, axis=0))


def widened(words: jax.Array) -> jax.Array:
    """bfloat16 is the upper half of float32."""
    return lax.bitcast_convert_type(words.astype(jnp.uint32) << 16, jnp.float32)
