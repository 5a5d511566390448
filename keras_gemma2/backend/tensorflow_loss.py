"""TensorFlow: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope

from keras_gemma2.backend.loss_terms import chunk_terms


def sums_in_chunks(
    head: Callable,
    cap: float | None,
    variables: list[keras.Variable],
    hidden: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    rows: int,
    training: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of a loss over rows; see `backend/torch_loss.py` for the arguments."""
    with AutocastScope(None):  # which would round the table as a whole
        values = [tf.convert_to_tensor(variable.value) for variable in variables]
    trained = [i for i, variable in enumerate(variables) if variable.trainable]

    def logits(tables: tuple, chunk: tf.Tensor) -> tf.Tensor:
        current = dict(zip(trained, tables))
        mapping = [(variable, current.get(i, values[i])) for i, variable in enumerate(variables)]
        with keras.StatelessScope(state_mapping=mapping), AutocastScope(None):
            return head(chunk)

    count, width = tf.shape(hidden)[0], hidden.shape[-1]
    size = rows if hidden.shape[0] is None else min(rows, hidden.shape[0])
    # Rows that count first; then the rest, which no chunk comes to.
    order = tf.argsort(tf.cast(tf.equal(weights, 0.0), tf.int32), stable=True)
    order = tf.concat([order, tf.fill([-count % size], count)], axis=0)
    chunks = (tf.math.count_nonzero(weights, dtype=tf.int32) + size - 1) // size

    def run(hidden: tf.Tensor, tables: tuple) -> tuple:
        def body(i, nll, correct, to_hidden, *to_tables):
            index = order[i * size : (i + 1) * size]
            index.set_shape([size])
            inside = tf.minimum(index, count - 1)
            chunk, label = tf.gather(hidden, inside), tf.gather(labels, inside)
            weight = tf.where(index < count, tf.gather(weights, inside), 0.0)
            if not training:
                more_nll, more_correct, _ = chunk_terms(logits(tables, chunk), label, weight, cap)
                return i + 1, nll + more_nll, correct + more_correct, to_hidden, *to_tables
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([chunk, *tables])
                raw = logits(tables, chunk)
            more_nll, more_correct, upstream = chunk_terms(raw, label, weight, cap)
            of_chunk, *of_tables = tape.gradient(raw, [chunk, *tables], output_gradients=upstream)
            # One row more, for what lies past the end.
            to_hidden = tf.tensor_scatter_nd_update(to_hidden, index[:, None], tf.cast(of_chunk, tf.float32))
            to_tables = [a + tf.cast(b, tf.float32) for a, b in zip(to_tables, of_tables)]
            return i + 1, nll + more_nll, correct + more_correct, to_hidden, *to_tables

        zero = tf.zeros((), tf.float32)
        empty = [tf.zeros([count + 1, width], tf.float32), *[tf.zeros(t.shape, tf.float32) for t in tables]] if training else [zero]
        start = [tf.zeros((), tf.int32), zero, zero, *empty]
        return tf.while_loop(lambda i, *_: i < chunks, body, start, parallel_iterations=1)[1:]

    if not training:
        return tuple(run(hidden, tuple(values[i] for i in trained))[:2])

    @tf.custom_gradient
    def sums(hidden: tf.Tensor, *tables: tf.Tensor) -> Any:
        nll, correct, to_hidden, *to_tables = run(hidden, tables)

        def backward(of_nll: tf.Tensor, of_correct: tf.Tensor) -> list[tf.Tensor]:
            to_arguments = [(to_hidden[:-1], hidden), *zip(to_tables, tables)]
            return [tf.cast(of_nll * gradient, argument.dtype) for gradient, argument in to_arguments]

        return (nll, correct), backward

    return sums(hidden, *[values[i] for i in trained])
