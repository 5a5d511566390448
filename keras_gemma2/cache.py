"""Key/value caches: one a layer, full for global layers, a ring of the window's size for local ones.

The token at position p lives in slot `p % size`. A ring of `window` slots therefore holds just the keys that a local layer
may see. A cache is a plain `(keys, values)` pair `[B, K, S, H]`; what is where follows from the rows' positions alone.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_gemma2 import backend


def cache_size(length: int, window: int | None) -> int:
    """Slots a layer needs for sequences of at most `length` tokens."""
    return length if window is None else min(window, length)


def slot_positions(last_position: Any, size: int) -> tuple[Any, Any]:
    """The position that each slot holds once `last_position [B]` is written, and whether there is one.

    Returns:
        int32 `[B, size]` and bool `[B, size]`. Slots never written come out with a negative position.
    """
    last = last_position[:, None]
    positions = last - ops.mod(last - ops.arange(size, dtype="int32")[None, :], size)
    return positions, positions >= 0


class PromptCache:
    """Collects a layer's keys and values while a prompt runs through it, one `update` a layer.

    Attention works on the prompt's own keys; what is kept for later is `stored`: of each row, the last tokens that fit,
    each in its slot. Padding, on the right, is not kept.

    Args:
        lengths: int32 `[B]`, real tokens of each row.
        size: slots, from `cache_size`.
    """

    def __init__(self, lengths: Any, size: int) -> None:
        positions, written = slot_positions(lengths - 1, size)
        self._source = ops.maximum(positions, 0)[:, None, :, None]
        self._written = written[:, None, :, None]
        self.stored: tuple[Any, Any] | None = None

    def update(self, keys: Any, values: Any) -> tuple[Any, Any]:
        self.stored = (self._gather(keys), self._gather(values))
        return keys, values

    def _gather(self, x: Any) -> Any:
        slots = ops.take_along_axis(x, ops.minimum(self._source, ops.shape(x)[2] - 1), axis=2)
        return ops.where(self._written, slots, ops.zeros_like(slots))


class StepCache:
    """Writes one new token a row into a layer's cache and attends to all of it.

    Args:
        cache: the layer's `(keys, values)`, each `[B, K, S, H]`.
        positions: int32 `[B]`, the position of each row's new token.
    """

    def __init__(self, cache: tuple[Any, Any], positions: Any) -> None:
        self.stored = cache
        self._slots = ops.mod(positions, cache[0].shape[2])[:, None]

    def update(self, keys: Any, values: Any) -> tuple[Any, Any]:
        self.stored = (
            backend.write_slots(self.stored[0], keys, self._slots),
            backend.write_slots(self.stored[1], values, self._slots),
        )
        return self.stored
