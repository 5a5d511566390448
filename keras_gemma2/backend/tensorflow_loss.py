"""TensorFlow: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope


def sums_in_chunks(
    head: Callable,
    terms: Callable,
    count: int,
    variables: list[keras.Variable],
    hidden: tf.Tensor,
    targets: tuple[tf.Tensor, ...],
    weights: tf.Tensor,
    rows: int,
    training: bool,
) -> tuple[tf.Tensor, ...]:
    """Sums of a loss over rows; see `backend/torch_loss.py` for the arguments."""
    with AutocastScope(None):  # which would round the table as a whole
        values = [tf.convert_to_tensor(variable.value) for variable in variables]
    trained = [i for i, variable in enumerate(variables) if variable.trainable]

    @contextlib.contextmanager
    def reading(tables: tuple) -> Iterator[None]:
        current = dict(zip(trained, tables))
        mapping = [(variable, current.get(i, values[i])) for i, variable in enumerate(variables)]
        with AutocastScope(None), keras.StatelessScope(state_mapping=mapping):
            yield

    total, width = tf.shape(hidden)[0], hidden.shape[-1]
    size = rows if hidden.shape[0] is None else min(rows, hidden.shape[0])
    # Rows that count first; then the rest, which no chunk comes to.
    order = tf.argsort(tf.cast(tf.equal(weights, 0.0), tf.int32), stable=True)
    order = tf.concat([order, tf.fill([-total % size], total)], axis=0)
    chunks = (tf.math.count_nonzero(weights, dtype=tf.int32) + size - 1) // size

    def run(hidden: tf.Tensor, tables: tuple) -> tuple:
        def body(i, sums, to_hidden, to_tables):
            index = order[i * size : (i + 1) * size]
            index.set_shape([size])
            inside = tf.minimum(index, total - 1)
            chunk, weight, *target = (tf.gather(array, inside) for array in (hidden, weights, *targets))
            weight = tf.where(index < total, weight, 0.0)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                if training:  # before the scope is entered, which casts what it is given
                    tape.watch([chunk, *tables])
                with reading(tables):
                    raw = head(chunk)
            with reading(tables):
                more, upstream = terms(raw, target, weight, training)
            sums = tuple(a + b for a, b in zip(sums, more, strict=True))
            if training:
                of_chunk, *of_tables = tape.gradient(raw, [chunk, *tables], output_gradients=upstream)
                # One row more, for what lies past the end.
                to_hidden = tf.tensor_scatter_nd_update(to_hidden, index[:, None], tf.cast(of_chunk, tf.float32))
                to_tables = tuple(a + tf.cast(b, tf.float32) for a, b in zip(to_tables, of_tables))
            return i + 1, sums, to_hidden, to_tables

        start = (tf.zeros((), tf.float32),) * count
        to_hidden = tf.zeros([total + 1, width] if training else [], tf.float32)
        to_tables = tuple(tf.zeros(t.shape, tf.float32) for t in tables) if training else ()
        state = (tf.zeros((), tf.int32), start, to_hidden, to_tables)
        return tf.while_loop(lambda i, *_: i < chunks, body, state, parallel_iterations=1)[1:]

    if not training:
        return tuple(run(hidden, tuple(values[i] for i in trained))[0])

    @tf.custom_gradient
    def sums(hidden: tf.Tensor, *tables: tf.Tensor) -> Any:
        found, to_hidden, to_tables = run(hidden, tables)

        def backward(of_first: tf.Tensor, *of_others: tf.Tensor) -> list[tf.Tensor]:
            to_arguments = [(to_hidden[:-1], hidden), *zip(to_tables, tables)]
            return [tf.cast(of_first * gradient, argument.dtype) for gradient, argument in to_arguments]

        return tuple(found), backward

    return sums(hidden, *[values[i] for i in trained])
