"""TensorFlow: products with weights kept in 8 or 4 bits. The weights are widened; activations are never rounded."""

from __future__ import annotations

import tensorflow as tf

from keras_gemma2.backend.tensorflow_blocks import blocked_product


def product(x: tf.Tensor, codes: tf.Tensor, scales: tf.Tensor, mode: str) -> tf.Tensor:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    codes, scales = tf.convert_to_tensor(codes), tf.convert_to_tensor(scales)  # Keras leaves a variable one
    rows = tf.reshape(x, (-1, x.shape[-1]))
    if mode == "int8":
        out = blocked_product(rows, (codes,), _widened_int8) * scales[:, 0]
    else:
        out = blocked_product(rows, (codes, scales), _widened_int4)
    out = tf.reshape(out, tf.concat([tf.shape(x)[:-1], [codes.shape[0]]], axis=0))
    out.set_shape(x.shape[:-1].concatenate(codes.shape[0]))
    return out


def _widened_int8(codes: tf.Tensor) -> list[tf.Tensor]:
    return [tf.cast(codes, tf.float32)]


def _widened_int4(codes: tf.Tensor, scales: tf.Tensor) -> list[tf.Tensor]:
    """The left half of the columns and the right half, `[rows, in / 2]` each; the scales of the left half come first."""
    columns, groups = codes.shape[1], scales.shape[1] // 2

    def scaled(nibbles: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        weights = tf.reshape(tf.cast(nibbles, tf.float32) - 8.0, (-1, groups, columns // groups))
        return tf.reshape(weights * scales[:, :, None], (-1, columns))

    high = tf.bitwise.right_shift(codes, tf.constant(4, tf.uint8))
    return [scaled(tf.bitwise.bitwise_and(codes, tf.constant(15, tf.uint8)), scales[:, :groups]), scaled(high, scales[:, groups:])]
