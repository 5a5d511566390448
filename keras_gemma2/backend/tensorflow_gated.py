"""TensorFlow: the gated activation of a feed-forward layer, with little memory in its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


def gated_gelu(gate: tf.Tensor, up: tf.Tensor) -> tf.Tensor:
    """`gelu_tanh(gate) * up`; see `backend/torch_gated.py`.

    XLA makes one loop of it, where TensorFlow would have a tensor of this size for each operation.
    """

    @tf.custom_gradient
    def gated(gate: tf.Tensor, up: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return _forward(gate, up), lambda upstream: _backward(gate, up, upstream)

    return gated(gate, up)


@tf.function(jit_compile=True, autograph=False, reduce_retracing=True)
def _forward(gate: tf.Tensor, up: tf.Tensor) -> tf.Tensor:
    return tf.nn.gelu(gate, approximate=True) * up


@tf.function(jit_compile=True, autograph=False, reduce_retracing=True)
def _backward(gate: tf.Tensor, up: tf.Tensor, upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    with tf.GradientTape() as tape:
        tape.watch((gate, up))
        product = tf.nn.gelu(gate, approximate=True) * up
    return tape.gradient(product, (gate, up), output_gradients=upstream)
