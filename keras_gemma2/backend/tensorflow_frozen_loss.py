"""TensorFlow: the loss over chunks of rows where the table is frozen and in float32, as with LoRA.

The logits of a chunk are held once: sums and gradient are taken from them a tile of the vocabulary at a time, and the tile's share
of the hidden states' gradient at once.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope

TILE = 8000  # of the vocabulary


def frozen_sums_in_chunks(
    table: keras.Variable, cap: float | None, hidden: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, rows: int, training: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of a loss over rows; see `backend/torch_frozen_loss.py` for the arguments."""
    with AutocastScope(None):
        table = tf.convert_to_tensor(table.value)
    if not training:
        return _run(table, cap, hidden, labels, weights, rows, False)[:2]

    @tf.custom_gradient
    def sums(hidden: tf.Tensor) -> Any:
        nll, correct, to_hidden = _run(table, cap, hidden, labels, weights, rows, True)
        return (nll, correct), lambda of_nll, of_correct: of_nll * to_hidden[:-1]

    return sums(hidden)


def _run(table: tf.Tensor, cap: float | None, hidden: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, rows: int, training: bool):
    count, width = tf.shape(hidden)[0], hidden.shape[-1]
    size = rows if hidden.shape[0] is None else min(rows, hidden.shape[0])
    # Rows that count first; then the rest, which no chunk comes to.
    order = tf.argsort(tf.cast(tf.equal(weights, 0.0), tf.int32), stable=True)
    order = tf.concat([order, tf.fill([-count % size], count)], axis=0)
    chunks = (tf.math.count_nonzero(weights, dtype=tf.int32) + size - 1) // size

    def body(i, nll, correct, to_hidden):
        index = order[i * size : (i + 1) * size]
        index.set_shape([size])
        inside = tf.minimum(index, count - 1)
        label, weight = tf.gather(labels, inside), tf.where(index < count, tf.gather(weights, inside), 0.0)
        logits = tf.matmul(tf.gather(hidden, inside), table, transpose_b=True)
        losses, right, log_total = _sums(logits, label, cap)
        counts = tf.not_equal(weight, 0.0)
        nll += tf.reduce_sum(tf.where(counts, losses * weight, 0.0))
        correct += tf.reduce_sum(tf.where(right, weight, 0.0))
        if training:
            of_chunk = tf.where(counts[:, None], _gradient(logits, label, log_total, cap, table) * weight[:, None], 0.0)
            # One row more, for what lies past the end.
            to_hidden = tf.tensor_scatter_nd_update(to_hidden, index[:, None], of_chunk)
        return i + 1, nll, correct, to_hidden

    zero = tf.zeros((), tf.float32)
    start = [tf.zeros((), tf.int32), zero, zero, tf.zeros([count + 1, width], tf.float32) if training else zero]
    return tf.while_loop(lambda i, *_: i < chunks, body, start, parallel_iterations=1)[1:]


def _over_tiles(function: Any, start: tf.Tensor, width: int) -> tf.Tensor:
    """Folds `function(state, first, size)` over tiles of `[0, width)`; each size is known when the graph is made."""
    full = width // TILE

    def body(i: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return i + 1, function(state, i * TILE, TILE)

    _, state = tf.while_loop(lambda i, _: i < full, body, [tf.constant(0), start], parallel_iterations=1)
    return function(state, tf.constant(full * TILE), width - full * TILE) if width % TILE else state


def _capped(logits: tf.Tensor, cap: float | None) -> tf.Tensor:
    return logits if cap is None else cap * tf.tanh(logits / cap)


def _sums(logits: tf.Tensor, labels: tf.Tensor, cap: float | None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Negative log-likelihoods `[n]`, which labels are right `[n]`, and the logarithm of each row's exponentials' sum `[n, 1]`."""
    rows, width = logits.shape
    known = (labels >= 0) & (labels < width)
    label_logits = _capped(tf.gather(logits, tf.where(known, labels, 0)[:, None], batch_dims=1), cap)
    highest = _capped(tf.reduce_max(logits, axis=-1, keepdims=True), cap)

    def add(total: tf.Tensor, first: tf.Tensor, size: int) -> tf.Tensor:
        tile = tf.slice(logits, [0, first], [rows, size])
        return total + tf.reduce_sum(tf.exp(_capped(tile, cap) - highest), axis=-1, keepdims=True)

    log_total = tf.math.log(_over_tiles(add, tf.zeros_like(highest), width)) + highest
    return tf.where(known, (log_total - label_logits)[:, 0], float("nan")), (label_logits >= highest)[:, 0], log_total


def _gradient(logits: tf.Tensor, labels: tf.Tensor, log_total: tf.Tensor, cap: float | None, table: tf.Tensor) -> tf.Tensor:
    """`[n, D]`: of the losses of rows, with respect to their hidden states."""
    rows, width = logits.shape

    def add(gradient: tf.Tensor, first: tf.Tensor, size: int) -> tf.Tensor:
        capped = _capped(tf.slice(logits, [0, first], [rows, size]), cap)
        share = tf.exp(capped - log_total) - tf.one_hot(labels - first, size)
        if cap is not None:
            share *= 1.0 - tf.square(capped / cap)
        return gradient + tf.matmul(share, tf.slice(table, [first, 0], [size, table.shape[1]]))

    return _over_tiles(add, tf.zeros([rows, table.shape[1]], tf.float32), width)
