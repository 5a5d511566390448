"""Half-precision weights on XLA's CPU backend, and bfloat16 ones handed to compiled code as the 16-bit words they are, too.

XLA's CPU compiler has products for bfloat16, but to take rows of a bfloat16 table it widens the table as a whole first, slowly. The
same memory seen as words is left alone. float16 matrices are widened for products, too: there, a block of rows at a time, which
stays in cache.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax

from keras_gemma2.backend.jax_blocks import blocked_product

_IN_SCOPE: contextvars.ContextVar[dict[int, jax.Array]] = contextvars.ContextVar("words")
# By the id of the array of which they are the words; an entry goes when that array does.
_ALIASES: dict[int, tuple[weakref.ref, jax.Array]] = {}


def as_words(value: jax.Array) -> jax.Array:
    """A bfloat16 matrix on the CPU as uint16, the same memory; any other array as it is.

    Making the alias costs more than a small product, so it is kept, but only as long as the array itself lives.
    """
    if not (value.ndim == 2 and value.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and len(value.devices()) == 1):
        return value
    key = id(value)
    known = _ALIASES.get(key)
    if known is None or known[0]() is not value:
        words = jax.device_put(np.asarray(value).view(np.uint16))
        known = weakref.ref(value, lambda gone: _forget(key, gone)), words
        _ALIASES[key] = known
    return known[1]


def _forget(key: int, gone: weakref.ref) -> None:
    # The id may already belong to a newer array.
    if key in _ALIASES and _ALIASES[key][0] is gone:
        del _ALIASES[key]


@contextlib.contextmanager
def words_scope(variables: list[keras.Variable], arrays: list[jax.Array]) -> Iterator[None]:
    """A context in which `words_of` finds the words, or float16 values, of these variables."""
    halves = {id(v): a for v, a in zip(variables, arrays) if a.ndim == 2 and a.dtype in (jnp.uint16, jnp.float16)}
    token = _IN_SCOPE.set(halves)
    try:
        yield
    finally:
        _IN_SCOPE.reset(token)


def words_of(variable: Any) -> jax.Array | None:
    """The words of a variable's bfloat16 value, or its float16 value, in the compiled function being traced, or None."""
    return _IN_SCOPE.get({}).get(id(variable))


def linear_in_blocks(x: jax.Array, words: jax.Array) -> jax.Array:
    """`x [..., in]` times the matrix of `words [out, in]` transposed: float32 `[..., out]`."""
    out = blocked_product(x.reshape(-1, x.shape[-1]), (words,), _parts)
    return out.reshape(*x.shape[:-1], words.shape[0])


def _parts(words: jax.Array) -> list[jax.Array]:
    return [widened(words)]


def take_rows(words: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of the matrix of `words`, in float32, which holds them exactly."""
    return widened(jnp.take(words, indices, axis=0))


def widened(words: jax.Array) -> jax.Array:
    """float32, of which bfloat16 is the upper half."""
    if words.dtype == jnp.uint16:
        return lax.bitcast_convert_type(words.astype(jnp.uint32) << 16, jnp.float32)
    return words.astype(jnp.float32)
