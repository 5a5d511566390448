"""Attention of a sequence to itself in blocks of queries and keys, forward and backward: no `[T, T]` of scores is held.

The forward pass keeps what each query read and the logarithm of its softmax's sum; the backward pass makes the weights of a block
from them again (FlashAttention-2, arXiv 2307.08691, sections 3.1 and 3.2). Pairs of blocks that no query sees are left out: those
after it, before its window, and of other samples.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.blocked_attention import MASKED_SCORE
from keras_gemma2.layers.mask import visible_pairs
from keras_gemma2.layers.numerics import saturate, soft_cap

BLOCK = 256  # tokens


def attend_in_blocks(queries: Any, keys: Any, values: Any, first: Any, index: Any, cap: float | None, block: int = BLOCK) -> Any:
    """What each query reads; can be differentiated with respect to queries, keys and values.

    Args:
        queries: scaled and rotated, `[B, K, G, T, H]`.
        keys, values: `[B, K, T, H]`.
        first, index: int32 `[B, T]`, from `VisibleKeys`.
        cap: soft cap on the scores; None for none.
        block: tokens at a time.

    Returns:
        `[B, K, G, T, H]` in the dtype of the queries; zeros for padding.
    """
    attention = _Blocks(queries, first, index, cap, block)
    blocks = [attention.split(x) for x in (queries, keys, values)]
    heads = backend.with_gradient(attention.forward, attention.backward, *blocks, *attention.ranges)
    return attention.joined(heads, queries)


class _Blocks:
    """One attention, with the sequence's blocks as the first axis of all its arrays: of n blocks of b tokens, queries
    `[n, B, K, G, b, H]`, keys and values `[n, B, K, b, H]`, ranges `[n, B, b]`."""

    def __init__(self, queries: Any, first: Any, index: Any, cap: float | None, size: int) -> None:
        self.length, self.size, self.cap = ops.shape(queries)[3], size, cap
        self.count = (self.length + size - 1) // size
        self.dtype = backend.attention_dtype(queries.dtype)
        first, index = (self.split(x[..., None], fill)[..., 0] for x, fill in ((first, 0), (index, -1)))
        self.ranges = first, index, *_first_blocks(first, index)

    def split(self, x: Any, fill: Any = 0) -> Any:
        """`[..., T, H] -> [n, ..., b, H]`, padded at the end."""
        shape, axis = ops.shape(x), len(x.shape) - 2
        padding = [(0, 0)] * axis + [(0, self.count * self.size - self.length), (0, 0)]
        x = ops.reshape(ops.pad(x, padding, constant_values=fill), (*shape[:axis], self.count, self.size, shape[-1]))
        return ops.moveaxis(x, axis, 0)

    def joined(self, x: Any, like: Any) -> Any:
        """`split` undone."""
        x = ops.moveaxis(x, 0, -3)
        shape = ops.shape(x)
        x = ops.reshape(x, (*shape[:-3], self.count * self.size, shape[-1]))[..., : self.length, :]
        return ops.reshape(ops.cast(x, like.dtype), ops.shape(like))

    def forward(self, queries: Any, keys: Any, values: Any, first: Any, index: Any, start: Any, stop: Any) -> tuple[Any, Any]:
        """What queries read; and with it what `backward` needs."""
        shape = ops.shape(queries)
        heads, sums = ops.zeros(shape, "float32"), ops.zeros((*shape[:-1], 1), "float32")

        def of_queries(i: Any, state: Any) -> Any:
            query = ops.cast(queries[i], self.dtype)

            def of_keys(j: Any, state: Any) -> Any:
                highest, total, weighted = state
                scores, _ = self._scores(query, keys[j], first[i], index[i], index[j])
                new_highest = ops.maximum(highest, ops.max(scores, axis=-1, keepdims=True))
                shrink, weights = ops.exp(highest - new_highest), ops.exp(scores - new_highest)
                total = total * shrink + ops.sum(weights, axis=-1, keepdims=True)
                return new_highest, total, weighted * shrink + self._product("bkgts,bksh->bkgth", weights, values[j])

            zero = ops.zeros((*shape[1:-1], 1), "float32")
            state_i = ops.fori_loop(start[i], stop[i], of_keys, (zero + MASKED_SCORE, zero, ops.zeros(shape[1:], "float32")))
            highest, total, weighted = state_i
            real = _real(index[i])  # padding has seen nothing, or only what is masked
            total = ops.where(real, total, 1.0)
            heads, sums = state
            heads = backend.add_block(heads, i, ops.where(real, weighted / total, 0.0))
            return heads, backend.add_block(sums, i, highest + ops.log(total))

        heads, sums = ops.fori_loop(0, self.count, of_queries, (heads, sums))
        return ops.cast(heads, queries.dtype), (queries, keys, values, first, index, start, stop, heads, sums)

    def backward(self, kept: tuple, upstream: Any) -> tuple:
        """Gradients with respect to the arguments of `forward`."""
        queries, keys, values, first, index, start, stop, heads, sums = kept
        shape = ops.shape(queries)
        gradients = [ops.zeros(ops.shape(x), "float32") for x in (queries, keys, values)]

        def of_queries(i: Any, state: Any) -> Any:
            query, up = ops.cast(queries[i], self.dtype), ops.where(_real(index[i]), ops.cast(upstream[i], "float32"), 0.0)
            along = ops.sum(up * heads[i], axis=-1, keepdims=True)

            def of_keys(j: Any, state: Any) -> Any:
                to_query, to_keys, to_values = state
                scores, capped = self._scores(query, keys[j], first[i], index[i], index[j])
                weights = ops.exp(scores - sums[i])
                to_values = backend.add_block(to_values, j, self._product("bkgts,bkgth->bksh", weights, up))
                to_scores = weights * (self._product("bkgth,bksh->bkgts", up, values[j]) - along)
                if self.cap is not None:
                    to_scores = to_scores * (1.0 - ops.square(capped / self.cap))
                to_keys = backend.add_block(to_keys, j, self._product("bkgts,bkgth->bksh", to_scores, query))
                return to_query + self._product("bkgts,bksh->bkgth", to_scores, keys[j]), to_keys, to_values

            to_queries, to_keys, to_values = state
            state_i = ops.zeros(shape[1:], "float32"), to_keys, to_values
            to_query, to_keys, to_values = ops.fori_loop(start[i], stop[i], of_keys, state_i)
            return backend.add_block(to_queries, i, to_query), to_keys, to_values

        found = ops.fori_loop(0, self.count, of_queries, tuple(gradients))
        return *(ops.cast(x, like.dtype) for x, like in zip(found, kept)), None, None, None, None

    def _scores(self, query: Any, key: Any, first: Any, index: Any, keys: Any) -> tuple[Any, Any]:
        """Scores `[B, K, G, b, b]` of a pair of blocks, capped: with the mask, and without."""
        scores = ops.cast(saturate(ops.einsum("bkgth,bksh->bkgts", query, ops.cast(key, self.dtype))), "float32")
        capped = soft_cap(scores, self.cap)
        mask = visible_pairs(first, index, keys)
        return ops.where(mask[:, None, None, :, :], capped, MASKED_SCORE), capped

    def _product(self, equation: str, first: Any, second: Any) -> Any:
        """An einsum in the dtype of attention, with a float32 result."""
        return ops.cast(ops.einsum(equation, ops.cast(first, self.dtype), ops.cast(second, self.dtype)), "float32")


def _real(index: Any) -> Any:
    """Which queries are no padding, `[B, b]`, to go with `[B, K, G, b, H]`."""
    return (index >= 0)[:, None, None, :, None]


def _first_blocks(first: Any, index: Any) -> tuple[Any, Any]:
    """For each block of queries the blocks of keys `[start, stop)` that hold all it sees: int32 `[n]` both."""
    count = ops.shape(index)[0]
    blocks = ops.arange(count, dtype="int32")
    real = index >= 0
    lowest = ops.min(ops.where(real, first, 2**30), axis=-1)  # [n, B]
    highest = ops.max(index, axis=-1)
    needed = ops.any(highest[None, :, :] >= lowest[:, None, :], axis=-1)  # [queries, keys]
    needed = ops.logical_and(needed, blocks[None, :] <= blocks[:, None])
    stop = ops.where(ops.any(needed, axis=-1), blocks + 1, 0)
    return ops.cast(ops.where(stop > 0, ops.argmax(ops.cast(needed, "int32"), axis=-1), 0), "int32"), stop
