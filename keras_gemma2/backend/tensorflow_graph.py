"""Products in graphs of dynamic sizes, which TensorFlow's own executor runs, and not XLA.

Its product of some three to thirty rows takes twice as long as reading the matrix; cut into blocks, of which each core takes some,
the same product takes no longer than with one row. And it runs products that do not need each other at the same time, each on all
cores, where they get into each other's way: a graph's products run one after the other here.

TensorFlow restores a variable with one thread: a table of some GB takes longer than all other weights. In a SavedModel it is
several variables.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

PART_BYTES = 1 << 30  # of a matrix, at most, in a variable of a SavedModel
FEWEST, MOST = 3, 32  # rows for which blocks are faster
LARGE = 1 << 15  # rows of a matrix, from which on one block is slower than the plain product
ROWS_A_BLOCK = (128, 2048)  # of the matrix
# Whether the number of rows is "any", which an operation has to look at, or is known to be "few", or not to be ("plain").
_ROWS: contextvars.ContextVar[str | None] = contextvars.ContextVar("rows", default=None)
_LAST: weakref.WeakKeyDictionary[tf.Graph, weakref.ref[tf.Tensor]] = weakref.WeakKeyDictionary()  # products of each graph
_PARTS: contextvars.ContextVar[dict[int, list[tf.Variable]] | None] = contextvars.ContextVar("parts", default=None)


@contextlib.contextmanager
def dynamic_graph(rows: str = "any") -> Iterator[None]:
    """A context for tracing a graph whose number of rows is known when it runs."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def known_rows() -> str | None:
    """What is known of the number of rows where the graph is being traced: "any" for nothing, "few", "plain"; None elsewhere."""
    return _ROWS.get()


def by_rows(count: tf.Tensor, function: Callable[[], Any]) -> Any:
    """What a function gives whose products all have `count` rows; it is traced twice, to branch once and not at each product.

    Args:
        count: int32 scalar.
        function: gives a tensor or several; the second time the same.
    """
    if _ROWS.get() != "any":
        return function()

    def traced(rows: str) -> Callable[[], Any]:
        def branch() -> Any:
            with dynamic_graph(rows):
                return function()

        return branch

    return tf.cond(_is_few(count), traced("few"), traced("plain"))


def _is_few(count: tf.Tensor) -> tf.Tensor:
    return tf.logical_and(count >= FEWEST, count <= MOST)


@contextlib.contextmanager
def in_parts(matrix: keras.Variable) -> Iterator[None]:
    """A context for tracing a graph to which a large matrix is several variables, each some of its rows, of the same memory."""
    token = _PARTS.set({id(matrix): _parts(matrix)})
    try:
        yield
    finally:
        _PARTS.reset(token)


def _parts(matrix: keras.Variable) -> list[Any]:
    value = tf.convert_to_tensor(matrix.value)
    rows, width = value.shape
    fewest = -(-rows * width * value.dtype.size // PART_BYTES)
    if fewest == 1 or not value.dtype.is_floating:  # codes are taken by other functions
        return [matrix]
    # Some more, where their products can be cut into blocks then.
    counts = (count for count in range(fewest, 2 * fewest) if rows % count == 0 and _block_size(rows // count))
    count = next(counts, fewest)
    sizes = [rows // count + (part < rows % count) for part in range(count)]  # as `embedding_lookup` wants them
    # A slice of rows is a view, and a variable keeps the tensor that it starts with.
    return [tf.Variable(value[sum(sizes[:part]) :][:size], trainable=False) for part, size in enumerate(sizes)]


def parts_of(matrix: Any) -> list[Any]:
    """The matrix, or the variables that stand for it in the graph being traced."""
    return (_PARTS.get() or {}).get(id(matrix), [matrix])


def joined_product(rows: tf.Tensor, parts: list[tf.Variable], one: Callable[[tf.Tensor, Any], tf.Tensor]) -> tf.Tensor:
    """`[R, out]`, of what `one` gives for rows `[R, in]` and each part of a matrix."""

    def joined() -> tf.Tensor:
        return tf.concat([one(rows, part) for part in parts], axis=1)

    return by_rows(tf.shape(rows)[0], joined) if rows.shape[0] is None else joined()


def load(folder: str) -> Any:
    """The SavedModel in a folder; to be kept as long as one of its functions is used."""
    return tf.saved_model.load(folder)


def product(rows: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """`rows [R, in]` times `kernel [out, in]` transposed: `[R, out]`."""
    block, known = _block_size(kernel.shape[0]), _ROWS.get()
    units, width = kernel.shape

    def plain() -> tf.Tensor:
        return _in_turn(rows, kernel)

    def in_blocks(blocks: Any) -> tf.Tensor:
        cut = tf.reshape(kernel, (blocks, -1, width))
        return tf.transpose(tf.reshape(_in_turn(cut, rows[None]), (units, tf.shape(rows)[0])))

    if known in (None, "plain") or block is None or rows.shape[0] is not None:
        return plain()
    if known == "few":
        return in_blocks(units // block)
    few = _is_few(tf.shape(rows)[0])
    if units < LARGE:  # one block is hardly slower than the plain product, and a graph without branches is sooner loaded
        return in_blocks(tf.where(few, units // block, 1))
    return tf.cond(few, lambda: in_blocks(units // block), plain)


def transposed_product(rows: tf.Tensor, kernel: Any) -> tf.Tensor:
    """`product` transposed, `[out, R]`, for some hundred rows and a large matrix: a block of it at a time, a tenth faster."""
    kernel = tf.convert_to_tensor(kernel)
    units, width = kernel.shape
    cut = tf.reshape(kernel, (units // (_block_size(units) or units), -1, width))
    return tf.reshape(_in_turn(cut, rows[None]), (units, tf.shape(rows)[0]))


def _in_turn(rows: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The product, which in a graph of dynamic sizes waits for the one that was traced before it."""
    if _ROWS.get() is None:
        return tf.matmul(rows, kernel, transpose_b=True)
    graph = tf.compat.v1.get_default_graph()
    last = _LAST[graph]() if graph in _LAST else None
    with tf.control_dependencies([] if last is None else [last]):
        found = tf.matmul(rows, kernel, transpose_b=True)
    _LAST[graph] = weakref.ref(found)
    return found


def _block_size(units: int) -> int | None:
    """The largest divisor that makes blocks of a good size; None where there is none."""
    smallest, largest = ROWS_A_BLOCK
    return next((size for size in range(min(largest, units // 2), smallest - 1, -1) if units % size == 0), None)
