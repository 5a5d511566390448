"""Products with a matrix that is widened to float32 a block of rows at a time.

TensorFlow's own products of half-precision matrices are 20 times slower than its float32 product on CPUs without such
instructions, and widening a matrix as a whole takes up to eight times its memory. A block stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

ELEMENTS_A_BLOCK = 1 << 19
Arrays = tuple[tf.Tensor, ...]
Widen = Callable[..., tf.Tensor]  # the arrays' rows -> float32 [rows, in]


def blocked_product(x: tf.Tensor, arrays: Arrays, widen: Widen) -> tf.Tensor:
    """`x [R, in]` times the matrix `widen(*arrays) [out, in]` transposed: float32 `[R, out]`; differentiable in x only.

    Args:
        x: the rows.
        arrays: each with `out` rows.
        widen: makes the matrix in float32 from the arrays, or a block of its rows from the same rows of theirs.
    """
    size, width = arrays[0].shape[0], x.shape[1]
    step = max(1, min(size, ELEMENTS_A_BLOCK // width))
    count = -(-size // step)

    def block(i: tf.Tensor) -> tf.Tensor:
        return widen(*(array[i * step : (i + 1) * step] for array in arrays))

    @tf.custom_gradient
    def product(rows: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        wide = tf.cast(rows, tf.float32)

        def add_block(i: tf.Tensor, products: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            return i + 1, products.write(i, tf.matmul(block(i), wide, transpose_b=True))

        products = tf.TensorArray(tf.float32, count, infer_shape=False, element_shape=(None, rows.shape[0]))
        _, products = tf.while_loop(lambda i, _: i < count, add_block, (0, products), parallel_iterations=1)

        def gradients(upstream: tf.Tensor) -> tf.Tensor:
            def add_gradient(i: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return i + 1, total + tf.matmul(upstream[:, i * step : (i + 1) * step], block(i))

            total = tf.while_loop(lambda i, _: i < count, add_gradient, (0, tf.zeros_like(wide)), parallel_iterations=1)[1]
            return tf.cast(total, rows.dtype)

        return tf.transpose(products.concat()), gradients

    return product(x)
