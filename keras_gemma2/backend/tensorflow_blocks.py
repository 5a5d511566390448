"""Products with a matrix that is widened to float32 a block of rows at a time.

TensorFlow's own products of half-precision matrices are 20 times slower than its float32 product on CPUs without such
instructions, and widening a matrix as a whole takes up to eight times its memory. A block stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

ELEMENTS_A_BLOCK = 600_000  # 2.4 MB in float32: smaller blocks cost calls, larger ones leave the cache
Arrays = tuple[tf.Tensor, ...]
# The arrays' rows -> the matrix's columns in one or more equal parts, each float32 [rows, in / parts].
Widen = Callable[..., Sequence[tf.Tensor]]


def blocked_product(x: tf.Tensor, arrays: Arrays, widen: Widen) -> tf.Tensor:
    """`x [R, in]` times the matrix `widen(*arrays) [out, in]` transposed: float32 `[R, out]`; differentiable in x only.

    Args:
        x: the rows.
        arrays: each with `out` rows.
        widen: makes the matrix, or a block of its rows from the same rows of the arrays.
    """

    if tf.config.list_logical_devices("GPU"):
        # Without a gradient to the weights, as below.
        weight = tf.stop_gradient(tf.cast(tf.concat(widen(*arrays), axis=1), x.dtype))
        return tf.cast(tf.matmul(x, weight, transpose_b=True), tf.float32)

    @tf.custom_gradient
    def product(rows: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        # Recorded block by block, the widened weights would stay for the gradient.
        return product_in_blocks(rows, arrays, widen), lambda upstream: tf.cast(
            gradient_in_blocks(upstream, arrays, widen), rows.dtype
        )

    return product(x)


def product_in_blocks(x: tf.Tensor, arrays: Arrays, widen: Widen) -> tf.Tensor:
    """`blocked_product`, without its gradient."""
    size, step, count = _blocks(arrays, x.shape[1])
    wide = tf.cast(x, tf.float32)

    def product(start: tf.Tensor | int, rows: int) -> tf.Tensor:
        parts = _block(widen, arrays, start, rows)
        columns = tf.split(wide, len(parts), axis=1)
        return tf.add_n([tf.matmul(part, some, transpose_b=True) for part, some in zip(parts, columns)])

    def add_block(i: tf.Tensor, products: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        return i + 1, products.write(i, product(i * step, step))

    products = tf.TensorArray(tf.float32, count, element_shape=(step, x.shape[0]))
    _, products = tf.while_loop(lambda i, _: i < count, add_block, (0, products), parallel_iterations=1, maximum_iterations=count)
    out, rest = tf.reshape(products.stack(), (count * step, tf.shape(x)[0])), size - count * step
    return tf.transpose(tf.concat([out, product(size - rest, rest)], axis=0) if rest else out)


def gradient_in_blocks(upstream: tf.Tensor, arrays: Arrays, widen: Widen) -> tf.Tensor:
    """`upstream [R, out]` times the matrix: float32 `[R, in]`, the gradient of `blocked_product` in x."""
    parts = _block(widen, arrays, 0, 1)
    size, step, count = _blocks(arrays, sum(part.shape[1] for part in parts))

    def gradients(start: tf.Tensor | int, rows: int) -> list[tf.Tensor]:
        some = tf.slice(upstream, (0, start), (-1, rows))
        return [tf.matmul(some, part) for part in _block(widen, arrays, start, rows)]

    def add_block(i: tf.Tensor, totals: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        return i + 1, [total + more for total, more in zip(totals, gradients(i * step, step))]

    zeros = [tf.zeros((tf.shape(upstream)[0], part.shape[1])) for part in parts]
    _, totals = tf.while_loop(lambda i, _: i < count, add_block, (0, zeros), parallel_iterations=1, maximum_iterations=count)
    done = count * step
    if done < size:
        totals = [total + more for total, more in zip(totals, gradients(done, size - done))]
    return tf.concat(totals, axis=1)


def _blocks(arrays: Arrays, width: int) -> tuple[int, int, int]:
    """Rows of the matrix, rows of a block and how many blocks are whole; even, so that little or nothing is left over."""
    size = arrays[0].shape[0]
    step = -(-size // -(-size // max(1, ELEMENTS_A_BLOCK // width)))
    return size, step, size // step


def _block(widen: Widen, arrays: Arrays, start: tf.Tensor | int, rows: int) -> Sequence[tf.Tensor]:
    return widen(*(tf.slice(array, (start, 0), (rows, array.shape[1])) for array in arrays))
