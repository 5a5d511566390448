"""Which keys a query may see: causal, inside the window, not padding."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_gemma2")
class AttentionMask(keras.layers.Layer):
    """The mask of a padded batch, made once a layer type and shared by its layers.

    Args:
        sliding_window_size: keys a query sees, with its own; None for a global layer.

    Call arguments:
        positions: int `[B, T]`, from `token_positions`.
        padding_mask: bool or int `[B, T]`, nonzero at real tokens.

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
        return attention_mask(positions, positions, ops.cast(padding_mask, "bool"), self.sliding_window_size)

    def compute_output_spec(self, positions: Any, padding_mask: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*positions.shape, positions.shape[-1]), "bool")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "sliding_window_size": self.sliding_window_size}


def token_positions(padding_mask: Any) -> Any:
    """Position of each real token among the real tokens of its row: `[B, T]` -> int32 `[B, T]`, starting at 0.

    So a row has the same positions however it is padded. Padding takes the position of the real token before it.
    """
    real = ops.cast(ops.cast(padding_mask, "bool"), "int32")  # any nonzero number marks a real token
    count = ops.cumsum(real, axis=-1)
    return ops.cast(ops.maximum(count - 1, 0), "int32")


def attention_mask(query_positions: Any, key_positions: Any, key_is_real: Any, window: int | None) -> Any:
    """`[B, T], [B, S], bool [B, S]` -> bool `[B, T, S]`: true where the key is real, not later, and within the window.

    The query at position p sees the keys p - window + 1 ... p: `window` keys with its own.
    """
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]
    visible = ops.logical_and(key_is_real[:, None, :], keys <= queries)
    if window is not None:
        visible = ops.logical_and(visible, queries - keys < window)
    return visible
