"""Drawing one token a row from a distribution, and the numbers that decide the draws."""

from __future__ import annotations

import functools
import hashlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2 and figure 3.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW_WORD, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


def most_likely(logits: Any) -> Any:
    """The first of the largest logits, int32 `[B]`; -1 for a row that holds NaN or +inf, or -inf only.

    In two levels, as `draw`: an `argmax` over the whole is several times slower than a maximum.
    """
    blocks = blocks_of(logits, -np.inf)
    # A maximum may pass over NaN (XLA's does on CPU); a sum does not.
    largest = ops.where(ops.isnan(ops.sum(blocks, axis=-1)), np.float32(np.inf), ops.max(blocks, axis=-1))
    peak = ops.max(largest, axis=-1, keepdims=True)
    block = _first(largest == peak)
    inside, _ = _take_block(blocks, block)
    token = block * blocks.shape[-1] + _first(inside == peak)
    return ops.where(ops.isfinite(peak[:, 0]), token, -1)


def draw(probabilities: Any, uniforms: Any) -> Any:
    """Draws one token a row: where the cumulated probabilities first exceed `uniforms`.

    Args:
        probabilities: float32 `[B, V]`, not negative; each row counts relative to its own sum.
        uniforms: float32 `[B]`, in [0, 1).

    Returns:
        int32 `[B]`. A token of probability 0 never comes out. -1 for a row whose sum is 0, infinite or NaN.

    In two levels, the block and then the token in the block: a running float32 sum over a whole large vocabulary would be slow, and
    would round small probabilities away.
    """
    blocks = blocks_of(probabilities, 0.0)
    sums = ops.sum(blocks, axis=-1)
    running = ops.cumsum(sums, axis=-1)
    total = running[:, -1]
    target = uniforms * total
    block = _first_over(running, sums, target)
    inside, row_of_block = _take_block(blocks, block)
    before = ops.take(ops.reshape(running - sums, (-1,)), row_of_block)
    token = block * blocks.shape[-1] + _first_over(ops.cumsum(inside, axis=-1), inside, target - before)
    return ops.where(ops.logical_and(total > 0, total < np.inf), token, -1)


@functools.lru_cache
def _width(size: int) -> int:
    """The size of a block: near the root of a row's size, and a divisor if there is one."""
    root = math.isqrt(size)
    largest = max(width for width in range(1, 2 * root + 1) if size % width == 0)
    return largest if largest > root // 4 else root


def blocks_of(x: Any, filling: float) -> Any:
    """`[B, V]` as `[B, blocks, width]`, filled up where no width divides V."""
    size = x.shape[-1]
    width = _width(size)
    if size % width:
        x = ops.pad(x, ((0, 0), (0, -size % width)), constant_values=filling)
    return ops.reshape(x, (-1, -(-size // width), width))


def _take_block(blocks: Any, block: Any) -> tuple[Any, Any]:
    """One block of each row, `[B, width]`, and its index among the blocks of all rows."""
    count, width = blocks.shape[1:]
    index = ops.arange(ops.shape(blocks)[0], dtype="int32") * count + block
    return ops.take(ops.reshape(blocks, (-1, width)), index, axis=0), index


def _first(found: Any) -> Any:
    """The index of the first True in each row of bool `[B, n]`; the last index if there is none. int32 `[B]`."""
    size = found.shape[-1]
    return ops.min(ops.where(found, ops.arange(size, dtype="int32")[None], size - 1), axis=-1)


def _first_over(running: Any, weights: Any, target: Any) -> Any:
    """The first index with a weight whose running sum is over `target` `[B]`; else the last with a weight. int32 `[B]`.

    Where sums round, the running sum may end under the target or grow where the weight is 0: hence both looks at the weights.
    """
    has_weight = weights > 0
    last = ops.max(ops.where(has_weight, ops.arange(weights.shape[-1], dtype="int32")[None], 0), axis=-1)
    return ops.minimum(_first(ops.logical_and(has_weight, running > target[:, None])), last)


def log_probability(logits: Any, tokens: Any) -> Any:
    """The log-probability of each row's token.

    Args:
        logits: float32 `[B, V]`, unfiltered.
        tokens: int `[B]`, in [0, V).

    Returns:
        float32 `[B]`.
    """
    chosen = ops.take_along_axis(logits, ops.cast(tokens, "int32")[:, None], axis=-1)[:, 0]
    return chosen - ops.logsumexp(logits, axis=-1)


def uniforms(seeds: Sequence[int], positions: Any, stream: int = 0) -> np.ndarray:
    """Uniform numbers that depend on a row's seed and position and on the stream, and on nothing else.

    Args:
        seeds: one a row, any Python integers.
        positions: int `[B]`, or `[B, n]` for several draws a row; not negative.
        stream: another number at the same seed and position for each use; any integer.

    Returns:
        numpy float32 of the positions' shape, in [0, 1), multiples of 2**-24.

    Raises:
        TypeError: for a seed or stream that is no integer.
        ValueError: for positions that are negative, no integers, or of another number of rows than the seeds.

    Example:
        >>> uniforms([7, 8], [0, 0]).shape
        (2,)

    Philox4x32-10, counter-based: the seed's and the stream's hash is the key and half of the counter, the position the other half.
    """
    positions = np.asarray(positions)
    if positions.shape[:1] != (len(seeds),) or positions.dtype.kind not in "iu" or (positions < 0).any():
        raise ValueError(
            f"`positions` must be integers of at least 0, one or one row of them for each of the {len(seeds)} seeds. "
            f"Received: {positions!r}."
        )
    words = np.array([_hash_words(_integer("seeds", seed), _integer("stream", stream)) for seed in seeds], "uint64")
    words = words.reshape(len(seeds), 4, *[1] * (positions.ndim - 1))
    position = positions.astype("uint64")
    counter = np.stack(np.broadcast_arrays(position & _LOW_WORD, position >> _WORD, words[:, 0], words[:, 1]))
    return ((philox(counter, words[:, 2], words[:, 3])[0] >> np.uint64(8)) * 2.0**-24).astype("float32")


def philox(counter: np.ndarray, key0: np.ndarray, key1: np.ndarray) -> np.ndarray:
    """Four random words for four counter words `[4, ...]` and two key words, all 32-bit numbers in uint64."""
    a, b, c, d = counter
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> _WORD) ^ b ^ key0, right & _LOW_WORD, (left >> _WORD) ^ d ^ key1, left & _LOW_WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW_WORD, (key1 + _KEY_STEPS[1]) & _LOW_WORD
    return np.stack([a, b, c, d])


@functools.lru_cache(maxsize=4096)
def _hash_words(seed: int, stream: int) -> tuple[int, ...]:
    """Four 32-bit words of a hash, so that neighbouring and huge seeds are equally good."""
    digest = hashlib.blake2b(f"{seed:x},{stream:x}".encode(), digest_size=16).digest()
    return tuple(np.frombuffer(digest, "<u4").tolist())


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be made of integers. Received: {value!r}, a {type(value).__name__}.")
    return int(value)
