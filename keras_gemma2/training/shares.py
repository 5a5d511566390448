"""A process's share of training data, where several processes train one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_gemma2 import backend
from keras_gemma2.text_inputs import shorten
from keras_gemma2.training.packing import PackedSamples


def share_of(data: Any, index: int, count: int) -> Any:
    """Every `count`-th row of data, from row `index` on.

    All shares are of one size, so that all processes make the same number of steps: up to `count - 1` of the last rows are in none.
    (Those of a `tf.data.Dataset` of unknown cardinality can differ by one: give `fit` the number of `steps_per_epoch` then.)

    Args:
        data: what `lm.fit` takes, in memory: a list, an array, a dict or a tuple of those, `PackedSamples`; or a `tf.data.Dataset`,
            of which each row (or batch, if it is batched) is one. Of a tuple `(x, y, sample_weight)` each is shared out.
        index: of the process, from 0.
        count: of processes.

    Returns:
        The same kind of thing.

    Raises:
        TypeError: for data that has no rows, such as a generator or a PyTorch `DataLoader`.
        ValueError: if there are fewer rows than processes, or parts of different sizes.

    Example:
        >>> share_of(["a", "b", "c", "d", "e"], 1, 2)
        ['b', 'd']
    """
    if isinstance(data, PackedSamples):
        shared = share_of({"x": data.x, "y": data.y, "sample_weight": data.sample_weight}, index, count)
        return dataclasses.replace(data, **shared, rows=share_of(data.rows, index, count))
    if hasattr(data, "shard") and hasattr(data, "element_spec"):
        size = int(data.cardinality())
        return (data.take(size // count * count) if size >= 0 else data).shard(count, index)
    sizes = _sizes(data)
    if len(sizes) != 1:
        raise ValueError(f"`data` must have the same number of rows in all its parts. Received: {sorted(sizes)} rows.")
    rows = sizes.pop() // count
    if not rows:
        raise ValueError(f"`data` must have a row or more for each of the {count} processes. Received: {shorten(data)}.")
    return _taken(data, slice(index, rows * count, count))


def _is_parts(data: Any) -> bool:
    """Whether this is a dict of parts, or a tuple `(x, y[, sample_weight])`."""
    return isinstance(data, Mapping) or (isinstance(data, tuple) and any(hasattr(part, "shape") or part is None for part in data))


def _sizes(data: Any) -> set[int]:
    if data is None:
        return set()
    if _is_parts(data):
        return set().union(*(_sizes(part) for part in (data.values() if isinstance(data, Mapping) else data)))
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or hasattr(data, "dataset"):
        raise TypeError(
            f"`data` must be rows in memory or a `tf.data.Dataset`. Received: {shorten(data)}, of type {type(data).__name__}. Give "
            "a `DataLoader` a `torch.utils.data.DistributedSampler` (with `drop_last=True`) instead, and let a generator give each "
            "process its own rows."
        )
    return {len(data)}


def _taken(data: Any, rows: slice) -> Any:
    if data is None or not _is_parts(data):
        return None if data is None else data[rows]
    if isinstance(data, Mapping):
        return {name: _taken(part, rows) for name, part in data.items()}
    return tuple(_taken(part, rows) for part in data)


# Batches on several devices ---------------------------------------------------------------------------------------------


def check_batches_divide(x: Any, batch_size: int | None, steps: int | None = None, name: str = "x") -> None:
    """Refuses batches whose rows do not divide among this process's groups of devices, before any is run.

    Args:
        x: what was read; batches that come one by one are looked at as they come.
        batch_size: as `fit` takes it.
        steps: of an epoch, if not all that there are.
        name: what errors call the data.

    Raises:
        ValueError: naming the rows and the batch size.
    """
    if backend.local_groups() == 1 or not isinstance(x, dict) or "token_ids" not in x:
        return
    rows, size = len(x["token_ids"]), batch_size or 32
    whole, last = divmod(rows, size)
    for count in ({size} if whole else set()) | ({last} if last and (steps is None or steps > whole) else set()):
        check_rows_divide(count, f"{rows} rows of `{name}` with batch_size={size}, which make a batch of {count}")


def check_rows_divide(count: int, said: str) -> None:
    """Refuses a batch whose rows do not divide among this process's groups of devices.

    Args:
        count: of its rows.
        said: what was received.

    Raises:
        ValueError: with the sizes that do.
    """
    groups = backend.local_groups()
    if count % groups:
        raise ValueError(
            f"A batch's rows must divide among {groups} groups of devices. Received: {said}. Make batches of a multiple of "
            f"{groups} rows, and leave out a last one that is smaller."
        )
