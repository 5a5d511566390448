"""Which keys a query may see: causal, inside the window, of the same sample, not padding.

All of it follows from the padding mask. A number in it other than 0 marks a real token; where several samples are packed in a row,
they are numbered upward (1 1 1 2 2 3 0 0), and each sees only itself and has positions of its own.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_gemma2")
class AttentionMask(keras.layers.Layer):
    """The mask of a padded batch, pair by pair: what `VisibleKeys` says in `[B, T]`, as `[B, T, T]`.

    Args:
        sliding_window_size: keys a query sees, with its own; None for a global layer.

    Call arguments:
        positions: int `[B, T]`, from `token_positions`.
        padding_mask: bool or int `[B, T]`, nonzero at real tokens; samples packed in a row are numbered upward.

    Returns:
        bool `[B, T, T]` (queries, keys).

    Example:
        >>> mask = keras.ops.ones((1, 4))
        >>> AttentionMask(2)(token_positions(mask), mask).shape
        (1, 4, 4)
    """

    def __init__(self, sliding_window_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.sliding_window_size = sliding_window_size
        self.built = True

    def call(self, positions: Any, padding_mask: Any) -> Any:
        visible = attention_mask(positions, positions, ops.cast(padding_mask, "bool"), self.sliding_window_size)
        samples = sample_numbers(padding_mask)
        return ops.logical_and(visible, samples[:, :, None] == samples[:, None, :])

    def compute_output_spec(self, positions: Any, padding_mask: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*positions.shape, positions.shape[-1]), "bool")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "sliding_window_size": self.sliding_window_size}


@keras.saving.register_keras_serializable(package="keras_gemma2")
class TokenPositions(keras.layers.Layer):
    """`token_positions` as a layer: bool or int `[B, T]` -> int32 `[B, T]`.

    Example:
        >>> TokenPositions()(keras.ops.array([[1, 1, 2, 2, 0]])).tolist()
        [[0, 1, 0, 1, 3]]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.built = True

    def call(self, padding_mask: Any) -> Any:
        return token_positions(padding_mask)

    def compute_output_spec(self, padding_mask: Any) -> keras.KerasTensor:
        return keras.KerasTensor(padding_mask.shape, "int32")

    def get_config(self) -> dict[str, Any]:
        return super().get_config()  # Keras's own, which it refuses where `__init__` was given a dtype policy and this is missing


@keras.saving.register_keras_serializable(package="keras_gemma2")
class VisibleKeys(keras.layers.Layer):
    """The keys that each query may see, as a range; made once a layer type and shared by its layers.

    Args:
        sliding_window_size: keys a query sees, with its own; None for a global layer.

    Call arguments:
        padding_mask: bool or int `[B, T]`, nonzero at real tokens; samples packed in a row are numbered upward.

    Returns:
        `(first, index)`, each int32 `[B, T]`. `index` counts the real tokens of a row, from 0; it is -1 for padding. A query sees
        the keys whose index is in `[first, its own index]`.

    Example:
        >>> first, index = VisibleKeys(2)(keras.ops.array([[1, 1, 1, 2, 2, 0]]))
        >>> first.tolist(), index.tolist()
        ([[0, 0, 1, 3, 3, 3]], [[0, 1, 2, 3, 4, -1]])
    """

    def __init__(self, sliding_window_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.sliding_window_size = sliding_window_size
        self.built = True

    def call(self, padding_mask: Any) -> tuple[Any, Any]:
        counted, starts = _counted(padding_mask)
        index = ops.maximum(counted - 1, 0)
        first = starts if self.sliding_window_size is None else ops.maximum(starts, index - (self.sliding_window_size - 1))
        return first, ops.where(ops.cast(padding_mask, "bool"), index, -1)

    def compute_output_spec(self, padding_mask: Any) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        return keras.KerasTensor(padding_mask.shape, "int32"), keras.KerasTensor(padding_mask.shape, "int32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "sliding_window_size": self.sliding_window_size}


def visible_pairs(first: Any, index: Any, keys: Any) -> Any:
    """What `VisibleKeys` gave for some queries (`first`, `index`, `[..., T]`) and the `index` of some keys `[..., S]`, as a mask:
    bool `[..., T, S]`."""
    keys = keys[..., None, :]
    return ops.logical_and(first[..., :, None] <= keys, keys <= index[..., :, None])


def sample_numbers(padding_mask: Any) -> Any:
    """The padding mask as int32 `[B, T]` of 0 (padding) and the samples' numbers, of which none is above T."""
    if keras.backend.standardize_dtype(padding_mask.dtype) == "bool":
        return ops.cast(padding_mask, "int32")
    real = ops.cast(ops.cast(padding_mask, "bool"), "int32")
    # A row has at most T samples: a mask of 255s is one of one sample.
    return real * ops.clip(ops.cast(padding_mask, "int32"), 1, ops.shape(padding_mask)[1])


def _counted(padding_mask: Any) -> tuple[Any, Any]:
    """Of each token: the real tokens of its row up to it, itself included, and those before its sample; int32 `[B, T]` both."""
    samples = sample_numbers(padding_mask)
    real = ops.cast(samples > 0, "int32")
    batch, length = ops.shape(samples)[0], ops.shape(samples)[1]
    rows = ops.arange(batch, dtype="int32")[:, None] * (length + 1)
    sizes = ops.segment_sum(ops.reshape(real, (-1,)), ops.reshape(rows + samples, (-1,)), batch * (length + 1))
    sizes = ops.reshape(sizes, (batch, length + 1))
    before = ops.cumsum(sizes, axis=-1) - sizes
    return ops.cumsum(real, axis=-1), ops.cast(ops.take_along_axis(before, samples, axis=1), "int32")


def token_positions(padding_mask: Any) -> Any:
    """Position of each real token among the real tokens of its sample: `[B, T]` -> int32 `[B, T]`, starting at 0.

    So a sample has the same positions however it is padded and packed. Padding has some position, too, which nothing depends on.
    """
    counted, starts = _counted(padding_mask)
    return ops.cast(ops.maximum(counted - 1 - starts, 0), "int32")


def attention_mask(query_positions: Any, key_positions: Any, key_is_real: Any, window: int | None) -> Any:
    """`[B, T], [B, S], bool [B, S]` -> bool `[B, T, S]`: true where the key is real, not later, and within the window.

    The query at position p sees the keys p - window + 1 ... p: `window` keys with its own.
    """
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]
    visible = ops.logical_and(key_is_real[:, None, :], keys <= queries)
    if window is not None:
        visible = ops.logical_and(visible, queries - keys < window)
    return visible
