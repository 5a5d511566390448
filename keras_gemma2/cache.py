"""Key/value caches: one a layer, full for global layers, a ring of the window's size for local ones.

The token at position p lives in slot `p % slots`. A ring of `window` slots therefore holds just the keys that a local layer
may see. A cache is a plain `(keys, values)` pair `[B, K, slots + 1, H]`; what is where follows from the rows' positions alone.
The one slot more is never read: what must not be kept, padding above all, is written there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers import attention_mask
from keras_gemma2.layers.blocked_attention import RunningSoftmax

Cache = tuple[Any, Any]
BLOCK = 1024  # slots that attention reads at a time, at most


def cache_slots(length: int, window: int | None, slack: int = 0) -> int:
    """Slots a layer needs for sequences of at most `length` tokens.

    Args:
        length: tokens.
        window: a local layer's; None for a global one.
        slack: tokens that may be written ahead and taken back (speculation): a ring without it would have lost as many old keys.
    """
    return length if window is None else min(window + slack, length)


def slot_positions(last_position: Any, slots: Any) -> Any:
    """The position that each slot holds once `last_position [B]` is written: int32 `[B, slots]`, negative for an empty slot."""
    last = last_position[:, None]
    return last - ops.mod(last - ops.arange(slots, dtype="int32")[None, :], slots)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where the tokens of one call stand; shared by all layers.

    Args:
        rows: int32 `[b]`, the caches' row of each row of tokens; None for all rows in order.
        starts: int32 `[b]`, position of each row's first token.
        counts: int32 `[b]`, tokens of each row that are real; the rest, on the right, is padding.
        steps: T, tokens of each row, padding included; in a graph of dynamic sizes a scalar tensor.
        fresh: whether nothing stands before them in the caches.
        whole: whether attention reads all slots of a cache at once, as programs without loops do.
    """

    rows: Any
    starts: Any
    counts: Any
    steps: Any
    fresh: bool = False
    whole: bool = False

    @property
    def positions(self) -> Any:
        """int32 `[b, T]`."""
        return self.starts[:, None] + ops.arange(self.steps, dtype="int32")[None, :]


class LayerCache:
    """One layer's cache during one call: attends to what is cached and to the new tokens, and stores these.

    Args:
        cache: the layer's `(keys, values)`, each `[B, K, slots + 1, H]`; may be overwritten.
        tokens: where the new tokens stand.
        window: a local layer's; None for a global one.
    """

    def __init__(self, cache: Cache, tokens: Tokens, window: int | None) -> None:
        self.stored = cache
        self.tokens = tokens
        self.window = window
        slots = cache[0].shape[2]
        # A tensor in a graph of dynamic sizes.
        self.slots = ops.shape(cache[0])[2] - 1 if slots is None else slots - 1

    def attend(self, queries: Any, keys: Any, values: Any, soft_cap: float | None) -> Any:
        """What each query reads from the keys it may see, and stores the new keys and values.

        Args:
            queries: `[b, K, G, T, H]`.
            keys, values: `[b, K, T, H]`, of the new tokens.
            soft_cap: on the scores; None for none.

        Returns:
            `[b, K, G, T, H]`, in the dtype of the queries.
        """
        softmax = RunningSoftmax(queries, soft_cap)
        if isinstance(self.tokens.steps, int) and self.tokens.steps == 1:
            # Written first and read after: the old cache has no other reader, so that it is updated in place.
            self._store(keys, values)
            return softmax.result(self._over_slots(softmax, softmax.start(), self.tokens.starts))
        # A ring loses keys that the first of several queries still needs: what is cached is read before the new is written.
        state = softmax.start()
        if not self.tokens.fresh:
            state = self._over_slots(softmax, state, self.tokens.starts - 1)
        state = softmax.add(state, keys, values, self._own_mask())
        self._store(keys, values)
        return softmax.result(state)

    def _over_slots(self, softmax: RunningSoftmax, state: Any, last: Any) -> Any:
        """Adds the cached tokens up to position `last [b]`, block by block; blocks that hold none are not read."""
        is_static = isinstance(self.slots, int)
        is_step = isinstance(self.tokens.steps, int) and self.tokens.steps == 1
        most = min(BLOCK, backend.step_block()) if is_step else BLOCK
        if self.tokens.whole or (is_static and self.slots <= most):
            return self._add_block(softmax, state, last, 0, self.slots)
        filled = ops.minimum(ops.max(last) + 1, self.slots)
        size = most if is_static else ops.minimum(self.slots, most)
        blocks = (filled + size - 1) // size

        def add(i: Any, state: Any) -> tuple[Any, Any]:
            return i + 1, self._add_block(softmax, state, last, i * size, size)

        zero = ops.zeros((), "int32")
        return ops.while_loop(lambda i, state: i < blocks, add, (zero, state))[1]

    def _add_block(self, softmax: RunningSoftmax, state: Any, last: Any, first: Any, size: Any) -> Any:
        if size is self.slots:
            start, size = 0, size + 1  # with the one that is never seen: a cache without it would be a copy
        else:  # the last block is moved to the left where it would pass the end; slots before `first` were in the block before
            start = ops.minimum(first, self.slots - size)
        slots = start + ops.arange(size, dtype="int32")[None, :]
        positions = last[:, None] - (last[:, None] - slots) % self.slots  # operators, which PyTorch's symbolic sizes pass
        real = ops.logical_and(positions >= 0, ops.logical_and(slots >= first, slots < self.slots))
        mask = attention_mask(self.tokens.positions, positions, real, self.window)
        keys, values = (backend.read_slots(x, self.tokens.rows, start, size) for x in self.stored)
        return softmax.add(state, keys, values, mask)

    def _own_mask(self) -> Any:
        positions = self.tokens.positions
        real = positions < (self.tokens.starts + self.tokens.counts)[:, None]
        return attention_mask(positions, positions, real, self.window)

    def _store(self, keys: Any, values: Any) -> None:
        """Writes the last tokens that fit, each in its slot; padding, and older tokens of a ring, go to the slot more."""
        positions, ends = self.tokens.positions, (self.tokens.starts + self.tokens.counts)[:, None]
        kept = ops.logical_and(positions < ends, positions >= ends - self.slots)
        slots = self.slots + ops.cast(kept, "int32") * (positions % self.slots - self.slots)
        self.stored = tuple(backend.write_slots(x, new, self.tokens.rows, slots) for x, new in zip(self.stored, (keys, values)))


def empty_caches(config: Any, batch: int, length: int, compute_dtype: str, slack: int = 0) -> list[Cache]:
    """Caches with nothing in them, one a layer.

    Args:
        config: a `Gemma2Config`.
        batch: B, rows.
        length: tokens that each row must have room for.
        compute_dtype: of the model.
        slack: as `cache_slots` takes it.
    """
    dtype = backend.cache_dtype(compute_dtype)

    def empty(kind: str) -> Any:
        slots = cache_slots(length, config.window(kind), slack)
        return backend.empty_cache((batch, config.num_key_value_heads, slots + 1, config.head_dim), dtype)

    return [(empty(kind), empty(kind)) for kind in config.layer_types]


def copied_caches(caches: list[Cache], count: Any, empty: list[Cache]) -> list[Cache]:
    """Caches of one row, in other sizes and for all rows of a batch.

    Args:
        caches: one a layer, of one row.
        count: int32 scalar, tokens that they hold.
        empty: one a layer, from `empty_caches`, with room for at least `count` tokens; a ring keeps the last of them.
    """

    def copied(old: Any, new: Any) -> Any:
        slots, old_slots = new.shape[2] - 1, old.shape[2] - 1
        positions = slot_positions(ops.reshape(count - 1, (1,)), slots)[0]
        rows = ops.take(old, ops.mod(ops.maximum(positions, 0), old_slots), axis=2)
        rows = ops.where(positions[None, None, :, None] >= 0, rows, ops.zeros_like(rows))
        rows = ops.broadcast_to(rows, (new.shape[0], *rows.shape[1:]))
        return ops.concatenate([rows, new[:, :, slots:]], axis=2)

    return [tuple(copied(old, new) for old, new in zip(*pair)) for pair in zip(caches, empty)]
