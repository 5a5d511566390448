"""TensorFlow: products with weights kept in 8 or 4 bits.

int8 weights meet rows of whole numbers where XLA compiles for a CPU; elsewhere, and in 4 bits, weights are widened and activations
never rounded.
"""

from __future__ import annotations

import tensorflow as tf

from keras_gemma2.backend.tensorflow_blocks import blocked_product
from keras_gemma2.backend.tensorflow_words import dot, is_xla_on_cpu

_BASE, _LARGEST = 254.0, 32_000.0  # of two digits between -127 and 127


def product(x: tf.Tensor, codes: tf.Tensor, scales: tf.Tensor, mode: str) -> tf.Tensor:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    codes, scales = tf.convert_to_tensor(codes), tf.convert_to_tensor(scales)  # Keras leaves a variable one
    rows = tf.reshape(x, (-1, x.shape[-1]))
    if mode == "int8" and is_xla_on_cpu():
        out = _in_digits(rows, codes) * scales[:, 0]
    elif mode == "int8":
        out = blocked_product(rows, (codes,), _widened_int8) * scales[:, 0]
    else:
        out = blocked_product(rows, (codes, scales), _widened_int4)
    out = tf.reshape(out, tf.concat([tf.shape(x)[:-1], [codes.shape[0]]], axis=0))
    out.set_shape(x.shape[:-1].concatenate(codes.shape[0]))
    return out


def _in_digits(rows: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
    """`rows [R, in]` times `codes [out, in]` transposed, float32 `[R, out]`, as in jax_quantized.py: each row as whole numbers."""
    rows = tf.cast(rows, tf.float32)
    # Not finite in, not finite out: the unit is then infinite or NaN.
    unit = tf.maximum(tf.reduce_max(tf.abs(rows), axis=1, keepdims=True), 2.0**-100) / _LARGEST
    numbers = rows / unit
    high = tf.round(numbers / _BASE)
    low = tf.round(numbers - high * _BASE)
    sums = dot(tf.cast(tf.concat([high, low], axis=0), tf.int8), codes, tf.int32)  # below 2**31
    high, low = tf.split(tf.cast(sums, tf.float32), 2)
    return (high * _BASE + low) * unit


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
