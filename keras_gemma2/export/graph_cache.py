"""The caches of a step of one token a row, in a graph of dynamic sizes that TensorFlow's own executor runs.

There each operation costs some microseconds, and nothing merges what the layers repeat: what all layers of a kind share is computed
once a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras_gemma2.cache import Cache
from keras_gemma2.layers.blocked_attention import RunningSoftmax

EMPTY = 3  # times the filled slots: where a cache has more, they are copied out, which costs as much as reading them thrice


class Places(NamedTuple):
    """Where each row's token goes in a cache, and which slots it sees.

    Args:
        index: int32 `[B, K, 1, 3]`, row, head and slot.
        mask: bool `[B, 1, S]`, true where a slot is seen; of the first S slots, beyond which nothing is.
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
    row, head = tf.meshgrid(tf.range(batch), tf.range(heads), indexing="ij")
    slot = tf.broadcast_to((positions % slots)[:, None], [batch, heads])
    filled = tf.clip_by_value(tf.reduce_max(positions) + 1, 1, slots)
    size = tf.where(EMPTY * filled < slots, filled, slots)
    positions = positions[:, None]
    held = positions - (positions - tf.range(size)[None]) % slots
    mask = held >= 0 if window is None else (held >= 0) & (positions - held < window)
    return Places(tf.stack([row, head, slot], axis=-1)[:, :, None], mask[:, None], tf.stack([-1, heads, size, width]))


class StepCache:
    """One layer's cache during such a step: what `LayerCache` is elsewhere.

    Args:
        cache: the layer's `(keys, values)`, each `[B, K, slots + 1, H]`; is overwritten where nothing else reads it.
        places: of the tokens.
    """

    def __init__(self, cache: Cache, places: Places) -> None:
        self.stored = cache
        self.places = places

    def attend(self, queries: Any, keys: Any, values: Any, soft_cap: float | None) -> Any:
        """Stores the new keys and values `[B, K, 1, H]`, and gives what the queries `[B, K, G, 1, H]` read."""
        import tensorflow as tf

        def written(cache: Any, new: Any) -> Any:
            return tf.tensor_scatter_nd_update(cache, self.places.index, tf.cast(new, cache.dtype))

        self.stored = tuple(written(cache, new) for cache, new in zip(self.stored, (keys, values)))
        # A slice of everything is not a copy.
        read = (tf.slice(cache, [0, 0, 0, 0], self.places.sizes) for cache in self.stored)
        return RunningSoftmax(queries, soft_cap).alone(*read, self.places.mask)
