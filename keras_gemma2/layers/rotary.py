"""Rotary position embedding (RoPE), half-split."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="keras_gemma2")
class RotaryEmbedding(keras.layers.Layer):
    """Cosines and sines that turn queries and keys by their positions; computed once a forward pass, in float32.

    Pair i of a head, made of elements i and i + head_dim / 2, turns by `position * max_wavelength ** (-2 i / head_dim)`.
    Source: RoFormer (arXiv 2104.09864) with the half-split pairing of Hugging Face and gemma_pytorch.

    Args:
        head_dim: width of a head (H), even.
        max_wavelength: base of the geometric series of frequencies.

    Call arguments:
        positions: int `[B, T]`.

    Returns:
        `(cos, sin)`, each float32 `[B, T, 1, H / 2]`; `apply_rotary` uses them.

    Example:
        >>> cos, sin = RotaryEmbedding(8)(keras.ops.arange(3)[None])
        >>> apply_rotary(keras.ops.ones((1, 3, 2, 8)), cos, sin).shape
        (1, 3, 2, 8)
    """

    def __init__(self, head_dim: int, max_wavelength: float = 10000.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if head_dim % 2:
            raise ValueError(f"`head_dim` must be even, to be split in two halves. Received: head_dim={head_dim}.")
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        self._frequencies = (1.0 / np.float32(max_wavelength) ** exponents).astype(np.float32)
        self.built = True

    def call(self, positions: Any) -> tuple[Any, Any]:
        # Positions up to 8192 times a frequency need float32: bfloat16 has 8 bits of mantissa.
        angles = ops.cast(positions, "float32")[:, :, None] * ops.convert_to_tensor(self._frequencies)
        angles = angles[:, :, None, :]
        return ops.cos(angles), ops.sin(angles)

    def compute_output_spec(self, positions: Any) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        shape = (*positions.shape, 1, self.head_dim // 2)
        return keras.KerasTensor(shape, "float32"), keras.KerasTensor(shape, "float32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "head_dim": self.head_dim, "max_wavelength": self.max_wavelength}


def apply_rotary(x: Any, cos: Any, sin: Any) -> Any:
    """Turns the heads of `x [B, T, heads, H]` by `cos, sin [B, T, 1, H / 2]`; float32 inside, x's dtype outside."""
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    turned = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(turned, x.dtype)
