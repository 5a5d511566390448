"""Products in graphs of dynamic sizes, which TensorFlow's own executor runs, and not XLA.

Its product of some three to thirty rows takes twice as long as reading the matrix; cut into blocks, of which each core takes some,
the same product takes no longer than with one row.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

FEWEST, MOST = 3, 32  # rows for which blocks are faster
ROWS_A_BLOCK = (128, 2048)  # of the matrix
_IN_SCOPE: contextvars.ContextVar[bool] = contextvars.ContextVar("dynamic_graph", default=False)


@contextlib.contextmanager
def dynamic_graph() -> Iterator[None]:
    """A context for tracing a graph whose number of rows is known when it runs."""
    token = _IN_SCOPE.set(True)
    try:
        yield
    finally:
        _IN_SCOPE.reset(token)


def load(folder: str) -> Any:
    """The SavedModel in a folder; to be kept as long as one of its functions is used."""
    return tf.saved_model.load(folder)


def product(rows: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """`rows [R, in]` times `kernel [out, in]` transposed: `[R, out]`."""
    block = _block_size(kernel.shape[0])
    if not _IN_SCOPE.get() or block is None or rows.shape[0] is not None:
        return tf.matmul(rows, kernel, transpose_b=True)
    count = tf.shape(rows)[0]
    units, width = kernel.shape

    def in_blocks() -> tf.Tensor:
        blocks = tf.reshape(kernel, (units // block, block, width))
        return tf.transpose(tf.reshape(tf.matmul(blocks, rows[None], transpose_b=True), (units, count)))

    few = tf.logical_and(count >= FEWEST, count <= MOST)
    return tf.cond(few, in_blocks, lambda: tf.matmul(rows, kernel, transpose_b=True))


def _block_size(units: int) -> int | None:
    """The largest divisor that makes blocks of a good size; None where there is none."""
    smallest, largest = ROWS_A_BLOCK
    return next((size for size in range(min(largest, units // 2), smallest - 1, -1) if units % size == 0), None)
