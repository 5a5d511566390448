"""A projection without bias whose kernel is stored [out, in]."""

from __future__ import annotations

from typing import Any

import keras

from keras_gemma2.layers.initializers import FanInNormal
from keras_gemma2.layers.numerics import saturate
from keras_gemma2.layers.quantization import MatrixLayer


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Linear(MatrixLayer):
    """`[..., in] -> [..., units]`, no bias, kernel stored `[units, in]`.

    The layout is Hugging Face's, so checkpoints load without transposing, and it is the fast one for a decoder that reads
    every weight once a token: each output is a dot product of two contiguous rows.

    With a dtype policy such as "int8_from_bfloat16", or after `quantize("int8")` or `quantize("int4")`, `kernel` holds the codes
    of the weights and `kernel_scale` their float32 scales (`keras_gemma2/quantization.py` has the formats).

    Args:
        units: width of the output.
        kernel_initializer: anything `keras.initializers.get` takes; default `FanInNormal`.

    Example:
        >>> Linear(8)(keras.ops.ones((2, 4))).shape
        (2, 8)
    """

    def __init__(self, units: int, kernel_initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.kernel_initializer = keras.initializers.get(kernel_initializer or FanInNormal())

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.build_matrix((self.units, input_shape[-1]), self.kernel_initializer)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return saturate(self.product(inputs))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**config, "units": self.units, "kernel_initializer": initializer}
