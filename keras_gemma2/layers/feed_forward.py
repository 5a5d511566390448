"""The gated feed-forward network (GeGLU)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.numerics import saturate
from keras_gemma2.layers.quantization import QuantizableContainer


@keras.saving.register_keras_serializable(package="keras_gemma2")
class FeedForward(QuantizableContainer, keras.layers.Layer):
    """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU. `[B, T, D] -> [B, T, D]`.

    Source: GLU variants (arXiv 2002.05202); Hugging Face `Gemma2MLP`. The exact GELU moves logits visibly.

    Args:
        intermediate_dim: width of one gate (F).

    Example:
        >>> FeedForward(16)(keras.ops.ones((1, 3, 8))).shape
        (1, 3, 8)
    """

    def __init__(self, intermediate_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        hidden_dim = input_shape[-1]
        self.gate = Linear(self.intermediate_dim, dtype=self.dtype_policy, name="gate")
        self.up = Linear(self.intermediate_dim, dtype=self.dtype_policy, name="up")
        self.down = Linear(hidden_dim, dtype=self.dtype_policy, name="down")
        self.gate.build((None, None, hidden_dim))
        self.up.build((None, None, hidden_dim))
        self.down.build((None, None, self.intermediate_dim))
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        gate, up = self.gate(inputs), self.up(inputs)
        if training and keras.backend.standardize_dtype(gate.dtype) != "float16":
            return self.down(backend.gated_gelu(gate, up))  # the widest arrays of a block: gate and up alone are kept
        return self.down(saturate(ops.gelu(gate, approximate=True) * up))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "intermediate_dim": self.intermediate_dim}
