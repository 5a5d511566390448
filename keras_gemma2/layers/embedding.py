"""The embedding that is also the output projection."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.initializers import FanInNormal
from keras_gemma2.layers.numerics import soft_cap, stream_dtype
from keras_gemma2.layers.quantization import MatrixLayer, take_dequantized


@keras.saving.register_keras_serializable(package="keras_gemma2")
class TiedEmbedding(MatrixLayer):
    """Token ids to hidden states, and with `reverse=True` hidden states to logits, through one table `[V, D]`.

    Embeddings are multiplied by sqrt(hidden_dim), rounded to the compute dtype first, as in training (Hugging Face
    `Gemma2Model`, gemma_pytorch): in bfloat16, sqrt(3584) is 59.75 and not 59.8665.
    An id outside `[0, vocabulary_size)` gives NaN on every backend, so that it cannot pass unseen in compiled code; calls
    with values at hand raise before (see `Gemma2Backbone`).

    Quantized, by its dtype policy or by `quantize`, `embeddings` holds codes and `embeddings_scale` their scales, as in `Linear`;
    rows that are looked up are those that the product uses.

    Args:
        vocabulary_size: V.
        hidden_dim: D.
        logit_soft_cap: cap on the logits of the reverse call; None for none.

    Call arguments:
        inputs: int `[B, T]`, or float `[..., D]` if `reverse`.
        reverse: whether to compute logits.

    Returns:
        `[B, T, D]`, or float32 logits `[..., V]` if `reverse`.

    Example:
        >>> embedding = TiedEmbedding(32, 8)
        >>> hidden = embedding(keras.ops.array([[1, 2]]))
        >>> embedding(hidden, reverse=True).shape
        (1, 2, 32)
    """

    matrix_name = "embeddings"

    def __init__(
        self,
        vocabulary_size: int,
        hidden_dim: int,
        logit_soft_cap: float | None = 30.0,
        embeddings_initializer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.hidden_dim = hidden_dim
        self.logit_soft_cap = logit_soft_cap
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer or FanInNormal())
        self.stream_dtype = stream_dtype(self.compute_dtype)

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        self.build_matrix((self.vocabulary_size, self.hidden_dim), self.embeddings_initializer)
        self.built = True

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        return self._logits(inputs) if reverse else self._embed(inputs)

    def _embed(self, token_ids: Any) -> Any:
        known = ops.logical_and(token_ids >= 0, token_ids < self.vocabulary_size)
        rows = self._rows(ops.where(known, token_ids, 0))
        dtype = self.stream_dtype
        scale = ops.cast(ops.cast(math.sqrt(self.hidden_dim), self.compute_dtype), dtype)
        scale = ops.where(known, scale, ops.cast(float("nan"), dtype))
        return ops.cast(rows, dtype) * scale[..., None]

    def _rows(self, indices: Any) -> Any:
        if self.quantization_mode is None:
            return backend.take_rows(self.embeddings, indices)
        return take_dequantized(self.embeddings, self.embeddings_scale, indices, self.quantization_mode)

    def _logits(self, hidden: Any) -> Any:
        return soft_cap(self.uncapped_logits(hidden), self.logit_soft_cap)

    def uncapped_logits(self, hidden: Any) -> Any:
        """Float32 `[..., V]` of `hidden [..., D]`, before the soft cap."""
        # The product accumulates and stays in float32: a cap of 30 in bfloat16 leaves steps of 1/8 near the top.
        return self.product(ops.cast(hidden, self.compute_dtype), float32_output=True)

    @property
    def frozen_float32_table(self) -> Any:
        """The variable `[V, D]` where logits are its plain product in float32, and it is not trained; else None."""
        is_plain = self.quantization_mode is None and self.compute_dtype == self.variable_dtype == "float32"
        return None if not is_plain or self.embeddings.trainable else self.embeddings

    def compute_output_spec(self, inputs: Any, reverse: bool = False) -> keras.KerasTensor:
        if reverse:
            return keras.KerasTensor((*inputs.shape[:-1], self.vocabulary_size), "float32")
        return keras.KerasTensor((*inputs.shape, self.hidden_dim), self.stream_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "hidden_dim": self.hidden_dim,
            "logit_soft_cap": self.logit_soft_cap,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }
