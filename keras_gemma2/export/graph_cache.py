"""The caches of a step of one token a row, in a graph of dynamic sizes that TensorFlow's own executor runs.

There each operation costs some microseconds, and nothing merges what the layers repeat: what all layers of a kind share is computed
once a step. And `TensorScatterUpdate` copies a cache each time, `InplaceUpdate` never does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras_gemma2.cache import Cache
from keras_gemma2.layers.blocked_attention import RunningSoftmax

EMPTY = 3  # times the filled slots: where a cache has more, they are copied out, which costs as much as reading them thrice


class Places(NamedTuple):
    """Where each row's token goes in a cache, and which slots it sees.

    Args:
        index: int32 `[B * K]`, of the flat cache `[B * K * (slots + 1), H]`.
        mask: bool `[B, 1, S]`, true where a slot is seen; of the first S, beyond which nothing is.
        sizes: int32 `[4]`, of the part of a cache that is read.
    """

    index: Any
    mask: Any
    sizes: Any


def places(cache: Any, positions: Any, window: int | None) -> Places:
    """Of tokens at some positions, for all layers of a kind.

    Args:
        cache: the keys of one of the layers, `[B, K, slots + 1, H]`.
        positions: int32 `[B]`.
        window: a local layer's; None for a global one.
    """
    import tensorflow as tf

    (batch, slots), (_, heads, _, width) = (tf.shape(cache)[0], tf.shape(cache)[2] - 1), cache.shape
    index = (tf.range(batch)[:, None] * heads + tf.range(heads)[None]) * (slots + 1) + (positions % slots)[:, None]
    filled = tf.clip_by_value(tf.reduce_max(positions) + 1, 1, slots)
    size = tf.where(EMPTY * filled < slots, filled, slots + 1)
    slot, positions = tf.range(size)[None], positions[:, None]
    held = positions - (positions - slot) % slots
    mask = (held >= 0) & (slot < slots)
    if window is not None:
        mask &= positions - held < window
    return Places(tf.reshape(index, [-1]), mask[:, None], tf.stack([-1, heads, size, width]))


class StepCache:
    """One layer's cache during such a step: what `LayerCache` is elsewhere.

    Args:
        cache: the layer's `(keys, values)`, each `[B, K, slots + 1, H]`; is overwritten, whoever else holds it (see `own`).
        places: of the tokens.
    """

    def __init__(self, cache: Cache, places: Places) -> None:
        self.stored = cache
        self.places = places

    def attend(self, queries: Any, keys: Any, values: Any, soft_cap: float | None) -> Any:
        """Stores the new keys and values `[B, K, 1, H]`, and gives what the queries `[B, K, G, 1, H]` read."""
        import tensorflow as tf

        def written(cache: Any, new: Any) -> Any:
            width = cache.shape[-1]
            flat, rows = tf.reshape(cache, [-1, width]), tf.reshape(tf.cast(new, cache.dtype), [-1, width])
            return tf.reshape(tf.raw_ops.InplaceUpdate(x=flat, i=self.places.index, v=rows), tf.shape(cache))

        self.stored = tuple(written(cache, new) for cache, new in zip(self.stored, (keys, values)))
        # A slice of everything is not a copy.
        read = (tf.slice(cache, [0, 0, 0, 0], self.places.sizes) for cache in self.stored)
        return RunningSoftmax(queries, soft_cap).alone(*read, self.places.mask)


def own(caches: list[Cache]) -> list[Cache]:
    """Copies that nothing else holds."""
    import tensorflow as tf

    return [tuple(tf.raw_ops.DeepCopy(x=array) for array in pair) for pair in caches]
