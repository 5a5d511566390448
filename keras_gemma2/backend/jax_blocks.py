"""Products with a matrix that is widened to float32 a block of rows at a time.

XLA's CPU compiler has a fast product for float32 only: it widens any other matrix as a whole before the product, slowly and at up
to eight times its memory. A block stays in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

ELEMENTS_A_BLOCK = 1 << 19
Arrays = tuple[jax.Array, ...]
Widen = Callable[..., jax.Array]  # the arrays' rows -> float32 [rows, in]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def blocked_product(x: jax.Array, arrays: Arrays, widen: Widen) -> jax.Array:
    """`x [R, in]` times the matrix `widen(*arrays) [out, in]` transposed: float32 `[R, out]`; differentiable in x only.

    Args:
        x: the rows.
        arrays: each with `out` rows.
        widen: makes the matrix in float32 from the arrays, or a block of its rows from the same rows of theirs.
    """
    cpu, default = functools.partial(_in_blocks, widen), functools.partial(_whole, widen)
    return lax.platform_dependent(x, arrays, cpu=cpu, default=default)


def _forward(x: jax.Array, arrays: Arrays, widen: Widen) -> tuple[jax.Array, tuple]:
    return blocked_product(x, arrays, widen), (jnp.zeros((0,), x.dtype), arrays)


def _backward(widen: Widen, kept: tuple, upstream: jax.Array) -> tuple:
    like, arrays = kept
    cpu, default = functools.partial(_to_x_in_blocks, widen), functools.partial(_to_x_whole, widen)
    return lax.platform_dependent(upstream, arrays, cpu=cpu, default=default).astype(like.dtype), None


blocked_product.defvjp(_forward, _backward)


def _whole(widen: Widen, x: jax.Array, arrays: Arrays) -> jax.Array:
    """For compilers that fuse the widening into the product."""
    return _times_transposed(x, widen(*arrays).astype(x.dtype))


def _to_x_whole(widen: Widen, upstream: jax.Array, arrays: Arrays) -> jax.Array:
    return upstream @ widen(*arrays)


def _in_blocks(widen: Widen, x: jax.Array, arrays: Arrays) -> jax.Array:
    wide, step, starts = x.astype(jnp.float32), *_blocks(widen, arrays)
    size = arrays[0].shape[0]
    blocks = lax.map(lambda start: _times_transposed(wide, _block(widen, arrays, start, step)), starts)
    out = jnp.moveaxis(blocks, 0, 1).reshape(x.shape[0], -1)
    rest = size - out.shape[1]
    if rest:
        last = _times_transposed(wide, _block(widen, arrays, size - rest, rest))
        out = jnp.concatenate([out, last], axis=1)
    return out


def _to_x_in_blocks(widen: Widen, upstream: jax.Array, arrays: Arrays) -> jax.Array:
    step, starts = _blocks(widen, arrays)
    (size, width), done = jax.eval_shape(widen, *arrays).shape, len(starts) * step

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        columns = lax.dynamic_slice_in_dim(upstream, start, step, 1)
        return total + columns @ _block(widen, arrays, start, step), None

    total = lax.scan(add, jnp.zeros((upstream.shape[0], width), jnp.float32), starts)[0]
    return total + upstream[:, done:] @ _block(widen, arrays, done, size - done) if done < size else total


def _blocks(widen: Widen, arrays: Arrays) -> tuple[int, jax.Array]:
    """Rows of a block and where the whole blocks start."""
    size, width = jax.eval_shape(widen, *arrays).shape
    step = max(1, min(size, ELEMENTS_A_BLOCK // width))
    return step, jnp.arange(size // step) * step


def _block(widen: Widen, arrays: Arrays, start: jax.Array | int, step: int) -> jax.Array:
    return widen(*(lax.dynamic_slice_in_dim(array, start, step, 0) for array in arrays))


def _times_transposed(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
