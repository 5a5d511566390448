"""Attention over keys that come in blocks, without ever holding all scores.

The softmax is kept as running sums (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135): of each query the
largest score so far, and the sum of weights and of weighted values relative to it.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.numerics import saturate, soft_cap

# Finite, and applied in float32 only: a row with every key masked comes out as a plain mean, not NaN.
MASKED_SCORE = -1e30


class RunningSoftmax:
    """One attention: queries against blocks of keys and values.

    Args:
        queries: scaled and rotated, `[B, K, G, T, H]`.
        cap: soft cap on the scores; None for none.

    Example:
        >>> softmax = RunningSoftmax(queries, 50.0)
        >>> state = softmax.add(softmax.start(), keys, values, mask)
        >>> heads = softmax.result(state)
    """

    def __init__(self, queries: Any, cap: float | None) -> None:
        self.output_dtype = queries.dtype
        self.dtype = backend.attention_dtype(queries.dtype)
        self.queries = ops.cast(queries, self.dtype)
        self.cap = cap

    def start(self) -> tuple[Any, Any, Any]:
        """Largest score `[B, K, G, T, 1]`, sum of weights likewise, and weighted values `[B, K, G, T, H]`, of no keys."""
        shape = ops.shape(self.queries)
        one = (*shape[:-1], 1)
        return ops.full(one, MASKED_SCORE, "float32"), ops.zeros(one, "float32"), ops.zeros(shape, "float32")

    def add(self, state: tuple[Any, Any, Any], keys: Any, values: Any, mask: Any) -> tuple[Any, Any, Any]:
        """The state with a block more: keys and values `[B, K, S, H]`, mask bool `[B, T, S]`, true where a query may see a key."""
        highest, total, weighted = state
        scores = self._scores(keys, mask)
        new_highest = ops.maximum(highest, ops.max(scores, axis=-1, keepdims=True))
        shrink, weights = ops.exp(highest - new_highest), ops.exp(scores - new_highest)
        total = total * shrink + ops.sum(weights, axis=-1, keepdims=True)
        return new_highest, total, weighted * shrink + self._read(weights, values)

    def alone(self, keys: Any, values: Any, mask: Any) -> Any:
        """What `result` gives for one block that holds all keys, of which each query sees one at least; in fewer operations."""
        return ops.cast(self._read(ops.softmax(self._scores(keys, mask), axis=-1), values), self.output_dtype)

    def _scores(self, keys: Any, mask: Any) -> Any:
        # float32 from here to the sums: the cap's tanh and the softmax lose too much in half precision.
        scores = ops.cast(saturate(backend.attention_scores(self.queries, ops.cast(keys, self.dtype))), "float32")
        return ops.where(mask[:, None, None, :, :], soft_cap(scores, self.cap), MASKED_SCORE)

    def _read(self, weights: Any, values: Any) -> Any:
        read = ops.einsum("bkgts,bksh->bkgth", ops.cast(weights, self.dtype), ops.cast(values, self.dtype))
        return ops.cast(read, "float32")

    def result(self, state: tuple[Any, Any, Any]) -> Any:
        """What each query read, `[B, K, G, T, H]`, in the dtype of the queries given."""
        _, total, weighted = state
        return ops.cast(weighted / total, self.output_dtype)
