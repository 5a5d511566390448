"""Root-mean-square normalization with Gemma's (1 + scale)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_gemma2.layers.numerics import saturating_cast


@keras.saving.register_keras_serializable(package="keras_gemma2")
class RMSNorm(keras.layers.Layer):
    """`x * rsqrt(mean(x^2) + epsilon) * (1 + scale)` over the last axis, in float32, cast last.

    Source: Hugging Face `Gemma2RMSNorm`, gemma_pytorch `RMSNorm`. Llama's order (cast, then multiply) differs in bfloat16.

    Args:
        epsilon: added to the mean of squares.
        output_dtype: dtype of the result; None means the compute dtype.

    Example:
        >>> RMSNorm()(keras.ops.ones((2, 4))).shape
        (2, 4)
    """

    def __init__(self, epsilon: float = 1e-6, output_dtype: str | None = None, **kwargs: Any) -> None:
        # The input may be wider than the compute dtype (a float32 residual stream under float16): not cast on entry.
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon
        self.output_dtype = output_dtype

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="zeros")
        self.built = True

    def call(self, inputs: Any) -> Any:
        x = ops.cast(inputs, "float32")  # a mean of squares in half precision loses the small ones
        x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.epsilon)
        return saturating_cast(x * (1.0 + ops.cast(self.scale, "float32")), self.output_dtype or self.compute_dtype)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, self.output_dtype or self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "output_dtype": self.output_dtype}
