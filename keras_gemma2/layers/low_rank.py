"""Low-rank factors beside a projection (LoRA, arXiv 2106.09685), and the matrix that a projection and its factors make together."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.numerics import saturate

_HALVES = ("bfloat16", "float16")
_MERGES_ON_SAVE: contextvars.ContextVar[bool] = contextvars.ContextVar("merges_on_save", default=False)


@contextlib.contextmanager
def merged_on_save() -> Iterator[None]:
    """A context in which projections store their matrix with the active factors added, and factors store nothing."""
    token = _MERGES_ON_SAVE.set(True)
    try:
        yield
    finally:
        _MERGES_ON_SAVE.reset(token)


def merges_on_save() -> bool:
    """Whether a `merged_on_save` context is entered."""
    return _MERGES_ON_SAVE.get()


def store_arrays(store: Any, arrays: Iterable[np.ndarray]) -> None:
    """Fills what Keras gives `save_own_variables`, as its layers do."""
    for i, array in enumerate(arrays):
        store[str(i)] = array


class LowRank(keras.layers.Layer):
    """`scale * B(A(dropout(x)))`, `[..., in] -> [..., units]`: two thin products, never the matrix `B A`.

    `lora_a` is `[rank, in]`, uniform in +-1/sqrt(in) at first, as PEFT's; `lora_b` is `[units, rank]`, zeros at first, so that new
    factors change nothing. Both are float32 where the weights are bfloat16 or float16, whose steps of training they would lose,
    else of the weights' own dtype. Products are made in the compute dtype, and their sum with the projection's in float32.

    Args:
        units: width of the output.
        rank: of the factors.
        alpha: `scale` is `alpha / rank`.
        dropout: rate of the dropout on the factors' input, in training.
        use_rslora: whether `scale` is `alpha / sqrt(rank)` (rank-stabilized LoRA, arXiv 2312.03732).
        values: numpy arrays of `lora_a` and `lora_b`; None for new ones.
    """

    def __init__(
        self,
        units: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        values: tuple[np.ndarray, np.ndarray] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units, self.rank = units, rank
        self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        # A layer of its own, which knows whether it is called in training.
        self.dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout") if dropout else None
        self._first = values

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        width = input_shape[-1]
        dtype = "float32" if self.variable_dtype in _HALVES else self.variable_dtype
        bound = 1 / math.sqrt(width)
        first = keras.initializers.RandomUniform(-bound, bound), "zeros"
        if self._first is not None:
            first = tuple(lambda shape, dtype=None, array=array: ops.convert_to_tensor(array, dtype) for array in self._first)
            self._first = None
        options = {"dtype": dtype, "autocast": False}  # `linear` casts
        self.lora_a = self.add_weight(name="lora_a", shape=(self.rank, width), initializer=first[0], **options)
        self.lora_b = self.add_weight(name="lora_b", shape=(self.units, self.rank), initializer=first[1], **options)
        self.built = True

    def added_to(self, outputs: Any, inputs: Any) -> Any:
        """The projection's `outputs [..., units]` of `inputs [..., in]`, and what the factors make of them."""
        if self.dropout is not None:
            inputs = self.dropout(inputs)
        dtype = self.compute_dtype
        thin = saturate(backend.linear(inputs, self.lora_a, dtype))
        delta = backend.linear(thin, self.lora_b, dtype, float32_output=dtype in _HALVES)
        return ops.cast(ops.cast(outputs, delta.dtype) + delta * self.scale, outputs.dtype)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`lora_a` and `lora_b` as numpy arrays."""
        return backend.whole_array(self.lora_a), backend.whole_array(self.lora_b)

    def save_own_variables(self, store: Any) -> None:
        if not merges_on_save():
            super().save_own_variables(store) if not backend.is_spread() else store_arrays(store, self.arrays())


class MergedMatrix:
    """The matrix of a projection with the product of its factors added, made block by block of rows.

    Args:
        matrix: a `keras.Variable` `[out, in]`, or a `QuantizedMatrix`.
        factors: built.
    """

    def __init__(self, matrix: Any, factors: LowRank) -> None:
        self.matrix, self.factors = matrix, factors
        self.shape, self.dtype = tuple(matrix.shape), matrix.dtype

    def row_blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Consecutive rows, `rows` at a time, in float32; in float64 where the weights are."""
        is_quantized = hasattr(self.matrix, "row_blocks")
        blocks = self.matrix.row_blocks(rows) if is_quantized else backend.numpy_row_blocks(self.matrix.value, rows)
        a, b = self.factors.arrays()
        start = 0
        for block in blocks:
            wide = block.astype(a.dtype)
            wide += (self.factors.scale * (b[start : start + len(block)] @ a)).astype(a.dtype)
            yield wide
            start += len(block)
