"""Products with a matrix that is widened to float32 a block of rows at a time.

XLA's CPU compiler has a fast product for float32 only: it widens any other matrix as a whole before the product, slowly and at up
to eight times its memory. A block stays in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

ELEMENTS_A_BLOCK = 600_000  # 2.4 MB in float32: smaller blocks cost calls, larger ones leave the cache
Arrays = tuple[jax.Array, ...]
# The arrays' rows -> the matrix's columns in one or more equal parts, each float32 [rows, in / parts].
Widen = Callable[..., Sequence[jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def blocked_product(x: jax.Array, arrays: Arrays, widen: Widen) -> jax.Array:
    """`x [R, in]` times the matrix `widen(*arrays) [out, in]` transposed: float32 `[R, out]`; differentiable in x only.

    Args:
        x: the rows.
        arrays: each with `out` rows.
        widen: makes the matrix, or a block of its rows from the same rows of the arrays. XLA's CPU compiler is slow at putting
            columns side by side, so they may come in parts.
    """
    cpu, default = functools.partial(_in_blocks, widen), functools.partial(whole, widen)
    return lax.platform_dependent(x, arrays, cpu=cpu, default=default)


def _forward(x: jax.Array, arrays: Arrays, widen: Widen) -> tuple[jax.Array, tuple]:
    return blocked_product(x, arrays, widen), (jnp.zeros((0,), x.dtype), arrays)


def _backward(widen: Widen, kept: tuple, upstream: jax.Array) -> tuple:
    like, arrays = kept
    return gradient_to_rows(widen, upstream, arrays).astype(like.dtype), None


def gradient_to_rows(widen: Widen, upstream: jax.Array, arrays: Arrays) -> jax.Array:
    """The gradient `[R, in]` with respect to the rows of such a product, from that with respect to its result `[R, out]`."""
    cpu, default = functools.partial(_to_x_in_blocks, widen), functools.partial(_to_x_whole, widen)
    return lax.platform_dependent(upstream, arrays, cpu=cpu, default=default)


blocked_product.defvjp(_forward, _backward)


def spread_product(x: jax.Array, arrays: Arrays, widen: Widen) -> jax.Array:
    """`blocked_product` where the arrays lie on several devices: parts are neither cut into blocks nor put side by side there."""
    parts = [lax.stop_gradient(part) for part in widen(*arrays)]
    columns = jnp.split(x.astype(jnp.float32), len(parts), axis=1)
    return sum(lax.dot_general(some, part, (((1,), (1,)), ((), ()))) for some, part in zip(columns, parts))


def whole(widen: Widen, x: jax.Array, arrays: Arrays) -> jax.Array:
    """For compilers that fuse the widening into the product."""
    weight = jnp.concatenate(widen(*arrays), axis=1).astype(x.dtype)
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _to_x_whole(widen: Widen, upstream: jax.Array, arrays: Arrays) -> jax.Array:
    return upstream @ jnp.concatenate(widen(*arrays), axis=1)


def _in_blocks(widen: Widen, x: jax.Array, arrays: Arrays) -> jax.Array:
    size, (step, starts) = arrays[0].shape[0], _blocks(widen, arrays)
    columns = jnp.split(x.astype(jnp.float32), len(_shapes(widen, arrays)), axis=1)

    def product(start: jax.Array | int, rows: int) -> jax.Array:
        # The block on the left: with 8 rows of x, 1.7 times as fast as x on the left.
        return sum(part @ some.T for part, some in zip(_block(widen, arrays, start, rows), columns))

    out = lax.map(lambda start: product(start, step), starts).reshape(len(starts) * step, x.shape[0])
    rest = size - out.shape[0]
    return (jnp.concatenate([out, product(size - rest, rest)]) if rest else out).T


def _to_x_in_blocks(widen: Widen, upstream: jax.Array, arrays: Arrays) -> jax.Array:
    size, (step, starts) = arrays[0].shape[0], _blocks(widen, arrays)

    def gradients(start: jax.Array | int, rows: int) -> list[jax.Array]:
        some = lax.dynamic_slice_in_dim(upstream, start, rows, 1)
        return [some @ part for part in _block(widen, arrays, start, rows)]

    def add(totals: list[jax.Array], start: jax.Array) -> tuple[list[jax.Array], None]:
        return [total + more for total, more in zip(totals, gradients(start, step))], None

    zeros = [jnp.zeros((upstream.shape[0], width), jnp.float32) for _, width in _shapes(widen, arrays)]
    totals, done = lax.scan(add, zeros, starts)[0], len(starts) * step
    if done < size:
        totals = [total + more for total, more in zip(totals, gradients(done, size - done))]
    return jnp.concatenate(totals, axis=1)


def _shapes(widen: Widen, arrays: Arrays) -> list[tuple[int, ...]]:
    return [part.shape for part in jax.eval_shape(widen, *arrays)]


def _blocks(widen: Widen, arrays: Arrays) -> tuple[int, jax.Array]:
    """Rows of a block and where the whole blocks start; as even as can be, so that what is left over is small or nothing."""
    shapes = _shapes(widen, arrays)
    size, width = shapes[0][0], shapes[0][1] * len(shapes)
    count = -(-size // max(1, ELEMENTS_A_BLOCK // width))
    step = -(-size // count)
    return step, jnp.arange(size // step) * step


def _block(widen: Widen, arrays: Arrays, start: jax.Array | int, step: int) -> Sequence[jax.Array]:
    return widen(*(lax.dynamic_slice_in_dim(array, start, step, 0) for array in arrays))
