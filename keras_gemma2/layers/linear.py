"""A projection without bias whose kernel is stored [out, in]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np

from keras_gemma2 import backend
from keras_gemma2.layers.initializers import FanInNormal
from keras_gemma2.layers.low_rank import LowRank, MergedMatrix, merges_on_save, store_arrays
from keras_gemma2.layers.numerics import saturate
from keras_gemma2.layers.quantization import MatrixLayer, float_policy, quantized_arrays, rows_a_block


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Linear(MatrixLayer):
    """`[..., in] -> [..., units]`, no bias, kernel stored `[units, in]`.

    The layout is Hugging Face's, so checkpoints load without transposing, and it is the fast one for a decoder that reads
    every weight once a token: each output is a dot product of two contiguous rows.

    With a dtype policy such as "int8_from_bfloat16", or after `quantize("int8")` or `quantize("int4")`, `kernel` holds the codes
    of the weights and `kernel_scale` their float32 scales (`keras_gemma2/quantization.py` has the formats).

    Low-rank factors may stand beside the kernel, whatever it is kept in: several pairs by name (`adapters`), at most one of them
    active.

    Args:
        units: width of the output.
        kernel_initializer: anything `keras.initializers.get` takes; default `FanInNormal`.

    Attributes:
        adapters: the factors there are, by name.
        active_adapter: the name of those that are added to the output; None for none.

    Example:
        >>> Linear(8)(keras.ops.ones((2, 4))).shape
        (2, 8)
    """

    def __init__(self, units: int, kernel_initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.kernel_initializer = keras.initializers.get(kernel_initializer or FanInNormal())
        self.adapters: dict[str, LowRank] = {}
        self.active_adapter: str | None = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.build_matrix((self.units, input_shape[-1]), self.kernel_initializer)
        self.built = True

    def call(self, inputs: Any) -> Any:
        outputs = self.product(inputs)
        if self.active_adapter is not None:
            outputs = self.adapters[self.active_adapter].added_to(outputs, inputs)
        return saturate(outputs)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**config, "units": self.units, "kernel_initializer": initializer}

    # Factors ----------------------------------------------------------------------------------------------------------------

    def new_factors(self, name: str, rank: int, alpha: float, dropout: float, use_rslora: bool, values: Any = None) -> LowRank:
        """Factors that fit this layer, built but not part of it yet; the arguments are those of `LowRank`."""
        policy = float_policy(self._own_policy())
        factors = LowRank(self.units, rank, alpha, dropout, use_rslora, values, dtype=policy, name=name)
        with contextlib.ExitStack() as stack:  # so that variables have paths of their own
            for part in self.path.split("/"):
                stack.enter_context(keras.name_scope(part))
            factors.build((None, None, self.matrix_shape[1]))
        return factors

    def add_factors(self, name: str, factors: LowRank) -> None:
        """Takes factors in, in place of those of the same name."""
        self.remove_factors(name)
        self._tracker.unlock()  # Keras locks what a built layer consists of
        try:
            self.adapters[name] = factors
        finally:
            self._tracker.lock()

    def remove_factors(self, name: str) -> None:
        """Gives factors up, if there are any of this name."""
        if self.active_adapter == name:
            self.active_adapter = None
        self.adapters.pop(name, None)

    def merged(self, name: str) -> MergedMatrix:
        """The matrix with the factors of a name added."""
        return MergedMatrix(self.matrix, self.adapters[name])

    def overflows(self, name: str) -> bool:
        """Whether finite factors make sums that are not finite in the weights' dtype; only float16 is so narrow."""
        if self.variable_dtype != "float16":
            return False
        blocks = self._in_own_dtype(self.merged(name).row_blocks(rows_a_block(self.matrix_shape)))
        return not all(np.isfinite(block).all() for block in blocks)

    def merge_factors(self, name: str) -> None:
        """Adds the product of factors to the weights, a block of rows at a time (quantized ones are quantized anew)."""
        blocks = self.merged(name).row_blocks(rows_a_block(self.matrix_shape))
        if self.quantization_mode is None:
            backend.assign_row_blocks(self.kernel, self._in_own_dtype(blocks))
        else:
            self.matrix.assign_row_blocks(blocks)

    def _in_own_dtype(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        dtype = np.dtype(ml_dtypes.bfloat16 if self.variable_dtype == "bfloat16" else self.variable_dtype)
        with np.errstate(over="ignore"):  # `overflows` tells
            for block in blocks:
                yield block.astype(dtype)

    def save_own_variables(self, store: Any) -> None:
        if self.active_adapter is None or not merges_on_save():
            super().save_own_variables(store)
            return
        blocks = self.merged(self.active_adapter).row_blocks(rows_a_block(self.matrix_shape))
        if self.quantization_mode is None:
            arrays = [np.concatenate(list(self._in_own_dtype(blocks)))]
        else:
            arrays = quantized_arrays(blocks, self.quantization_mode, self.variable_dtype)
        store_arrays(store, arrays)
