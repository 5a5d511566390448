"""Products in graphs of dynamic sizes, which TensorFlow's own executor runs, and not XLA.

Its product of some three to thirty rows takes twice as long as reading the matrix; cut into blocks, of which each core takes some,
the same product takes no longer than with one row.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

FEWEST, MOST = 3, 32  # rows for which blocks are faster
LARGE = 1 << 15  # rows of a matrix, from which on one block is slower than the plain product
ROWS_A_BLOCK = (128, 2048)  # of the matrix
# Whether the number of rows is "any", which an operation has to look at, or is known to be "few", or not to be ("plain").
_ROWS: contextvars.ContextVar[str | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def dynamic_graph(rows: str = "any") -> Iterator[None]:
    """A context for tracing a graph whose number of rows is known when it runs."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def by_rows(count: tf.Tensor, function: Callable[[], Any]) -> Any:
    """What a function gives whose products all have `count` rows; it is traced twice, to branch once and not at each product."""
    if _ROWS.get() is None:
        return function()

    def traced(rows: str) -> Callable[[], Any]:
        def branch() -> Any:
            with dynamic_graph(rows):
                return function()

        return branch

    return tf.cond(_is_few(count), traced("few"), traced("plain"))


def _is_few(count: tf.Tensor) -> tf.Tensor:
    return tf.logical_and(count >= FEWEST, count <= MOST)


def load(folder: str) -> Any:
    """The SavedModel in a folder; to be kept as long as one of its functions is used."""
    return tf.saved_model.load(folder)


def product(rows: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """`rows [R, in]` times `kernel [out, in]` transposed: `[R, out]`."""
    block, known = _block_size(kernel.shape[0]), _ROWS.get()
    units, width = kernel.shape

    def plain() -> tf.Tensor:
        return tf.matmul(rows, kernel, transpose_b=True)

    def in_blocks(blocks: Any) -> tf.Tensor:
        cut = tf.reshape(kernel, (blocks, -1, width))
        return tf.transpose(tf.reshape(tf.matmul(cut, rows[None], transpose_b=True), (units, tf.shape(rows)[0])))

    if known in (None, "plain") or block is None or rows.shape[0] is not None:
        return plain()
    if known == "few":
        return in_blocks(units // block)
    few = _is_few(tf.shape(rows)[0])
    if units < LARGE:  # one block is hardly slower than the plain product, and a graph without branches is sooner loaded
        return in_blocks(tf.where(few, units // block, 1))
    return tf.cond(few, lambda: in_blocks(units // block), plain)


def _block_size(units: int) -> int | None:
    """The largest divisor that makes blocks of a good size; None where there is none."""
    smallest, largest = ROWS_A_BLOCK
    return next((size for size in range(min(largest, units // 2), smallest - 1, -1) if units % size == 0), None)
