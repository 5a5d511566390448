"""Grouped-query attention with a soft cap on its scores."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_gemma2.layers.blocked_attention import MASKED_SCORE
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.mask import visible_pairs
from keras_gemma2.layers.numerics import leading_sizes, saturate, soft_cap
from keras_gemma2.layers.quantization import QuantizableContainer
from keras_gemma2.layers.rotary import apply_rotary
from keras_gemma2.layers.trained_attention import BLOCK, attend_in_blocks


@keras.saving.register_keras_serializable(package="keras_gemma2")
class GroupedQueryAttention(QuantizableContainer, keras.layers.Layer):
    """Project, rotate, scale, cache, score, cap, mask, softmax, combine, project out.

    Each of the K key/value heads serves G = N / K query heads. Source: technical report section 2; GQA (arXiv 2305.13245).

    Args:
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        head_dim: H.
        query_pre_attn_scalar: queries are multiplied by this to the power -0.5; None means head_dim.
        logit_soft_cap: cap on the scores; None for none.

    Call arguments:
        inputs: `[B, T, D]`.
        cos, sin: float32 `[B, T, 1, H / 2]`, from `RotaryEmbedding`.
        mask: bool `[B, T, T]`, true where a query may see a key; or `(first, index)` of `VisibleKeys`, with which long rows are
            attended to in blocks, and no `[T, T]` is held; None with a cache, which knows.
        cache: None, or an object whose `attend(queries, keys, values, soft_cap)` stores the new keys and values and gives what the
            queries read from all it holds (`keras_gemma2.cache.LayerCache`).

    Returns:
        `[B, T, D]` in the compute dtype.

    Example:
        >>> from keras_gemma2.layers import AttentionMask, RotaryEmbedding, token_positions
        >>> x, mask = keras.ops.ones((1, 3, 24)), keras.ops.ones((1, 3))
        >>> positions = token_positions(mask)
        >>> cos, sin = RotaryEmbedding(8)(positions)
        >>> GroupedQueryAttention(4, 2, 8)(x, cos, sin, AttentionMask()(positions, mask)).shape
        (1, 3, 24)
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        query_pre_attn_scalar: float | None = None,
        logit_soft_cap: float | None = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # cos and sin must stay float32
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_query_heads={num_query_heads}, num_key_value_heads={num_key_value_heads}."
            )
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_pre_attn_scalar = head_dim if query_pre_attn_scalar is None else query_pre_attn_scalar
        self.logit_soft_cap = logit_soft_cap

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        hidden_dim, keys = input_shape[-1], self.num_key_value_heads * self.head_dim
        queries = self.num_query_heads * self.head_dim
        self.query = self._projection("query", queries, hidden_dim)
        self.key = self._projection("key", keys, hidden_dim)
        self.value = self._projection("value", keys, hidden_dim)
        self.output_projection = self._projection("output_projection", hidden_dim, queries)
        self.built = True

    def _projection(self, name: str, units: int, width: int) -> Linear:
        layer = Linear(units, dtype=self.dtype_policy, name=name)
        layer.build((None, None, width))
        return layer

    def call(self, inputs: Any, cos: Any, sin: Any, mask: Any, cache: Any = None) -> Any:
        queries, keys, values = self._project(inputs, cos, sin)
        if cache is not None:
            heads = cache.attend(queries, keys, values, self.logit_soft_cap)
        elif isinstance(mask, (tuple, list)) and not _is_short(inputs.shape[1]):
            heads = attend_in_blocks(queries, keys, values, *mask, self.logit_soft_cap)
        else:
            mask = visible_pairs(*mask, mask[1]) if isinstance(mask, (tuple, list)) else mask
            scores = soft_cap(self._scores(queries, keys), self.logit_soft_cap)
            heads = self._combine(self._masked_softmax(scores, mask), values)
        return self.output_projection(self._together(heads))

    def _project(self, inputs: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
        """Scaled, rotated queries `[B, K, G, T, H]`; rotated keys and plain values `[B, K, T, H]`."""
        batch, steps = leading_sizes(inputs, 0, 1)
        kv_heads, groups = self.num_key_value_heads, self.num_query_heads // self.num_key_value_heads
        queries = ops.reshape(self.query(inputs), (batch, steps, self.num_query_heads, self.head_dim))
        keys = ops.reshape(self.key(inputs), (batch, steps, kv_heads, self.head_dim))
        values = ops.reshape(self.value(inputs), (batch, steps, kv_heads, self.head_dim))
        queries = apply_rotary(queries, cos, sin) * self.query_pre_attn_scalar**-0.5
        queries = ops.reshape(queries, (batch, steps, kv_heads, groups, self.head_dim))
        keys = apply_rotary(keys, cos, sin)
        return (
            ops.transpose(queries, (0, 2, 3, 1, 4)),
            ops.transpose(keys, (0, 2, 1, 3)),
            ops.transpose(values, (0, 2, 1, 3)),
        )

    def _scores(self, queries: Any, keys: Any) -> Any:
        # float32 from here to the softmax: the cap's tanh and the softmax's sum lose too much in half precision.
        return ops.cast(saturate(ops.einsum("bkgth,bksh->bkgts", queries, keys)), "float32")

    def _masked_softmax(self, scores: Any, mask: Any) -> Any:
        scores = ops.where(mask[:, None, None, :, :], scores, MASKED_SCORE)
        return ops.cast(ops.softmax(scores, axis=-1), self.compute_dtype)

    def _combine(self, weights: Any, values: Any) -> Any:
        return ops.einsum("bkgts,bksh->bkgth", weights, values)

    def _together(self, heads: Any) -> Any:
        """`[B, K, G, T, H] -> [B, T, N * H]`."""
        batch, steps = leading_sizes(heads, 0, 3)
        return ops.reshape(ops.transpose(heads, (0, 3, 1, 2, 4)), (batch, steps, self.num_query_heads * self.head_dim))

    def compute_output_spec(self, inputs: Any, cos: Any, sin: Any, mask: Any, cache: Any = None) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "logit_soft_cap": self.logit_soft_cap,
        }


def _is_short(length: int | None) -> bool:
    """Whether all scores of a sequence are no more than those of a block."""
    return length is not None and length <= BLOCK
