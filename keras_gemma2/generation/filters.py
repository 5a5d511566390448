"""Filters on logits, in the order of transformers' `generate`: bias, penalties, temperature, top-k, top-p, min-p.

Pure functions of `keras.ops` that run alike inside `jax.jit`, inside `tf.function` and eagerly. All numbers are arrays with one
entry a row, so that changing one compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.generation.drawing import blocks_of

IN_PROMPT, GENERATED = 1, 2  # bits of the marks
# exp(-104) is 0 in float32, denormals included: logits this many temperatures under the largest have no probability.
LOWEST_EXPONENT = 104.0
LOWEST = np.finfo("float32").min  # bisection needs finite ends
# Halving the difference of two values comes near a threshold soonest; halving the number of floats in between ends for sure.
STEPS_BY_VALUE, STEPS_BY_BITS = 30, 33


def penalized(key: Any, arrays: Mapping[str, Any], marks: Any, logits: Any) -> Any:
    """Logits `[B, V]` after `logit_bias`, `repetition_penalty` and `presence_penalty`.

    Args:
        key: static switches of the plan; reads `biased` and `penalized`.
        arrays: of the plan.
        marks: int8 `[B, V]`, bit 1 for tokens of the prompt, bit 2 for generated ones; not read without penalties.
        logits: float32 `[B, V]`.

    The repetition penalty (arXiv 1909.05858) divides positive and multiplies negative logits of all tokens seen; the presence
    penalty is subtracted from the logits of tokens that were generated.
    """
    if key.biased:
        logits = logits + arrays["bias"]
    if key.penalized:
        repetition = arrays["repetition_penalty"][:, None]
        scaled = ops.where(logits < 0, logits * repetition, logits / repetition)
        logits = ops.where(marks > 0, scaled, logits)
        lowered = logits - arrays["presence_penalty"][:, None]
        logits = ops.where(marks >= GENERATED, lowered, logits)
    return logits


def mark(key: Any, marks: Any, tokens: Any) -> Any:
    """The marks with `tokens` int32 `[B]` as generated; a token of -1 marks nothing. As they are without penalties."""
    if not key.penalized:
        return marks
    chosen = ops.arange(marks.shape[1], dtype="int32")[None] == tokens[:, None]
    return ops.where(chosen, ops.bitwise_or(marks, ops.cast(GENERATED, "int8")), marks)


def warped(arrays: Mapping[str, Any], logits: Any) -> Any:
    """Weights `[B, V]` after temperature, top-k, top-p and min-p: the softmax's terms relative to its largest, or 0.

    Args:
        arrays: of the plan.
        logits: float32 `[B, V]`, after bias and penalties.

    Returns:
        float32, not normalized: the largest is 1. The weights of rows with NaN or +inf, or with -inf only, sum to NaN.

    Tokens that tie with the last one kept by top-k or top-p are kept too. (transformers agrees for top-k; its top-p keeps as many
    of them as its sort puts first.)
    """
    size = logits.shape[-1]
    logits = blocks_of(logits, -np.inf)
    peak = ops.max(logits, axis=(1, 2), keepdims=True)
    temperature, top_k, top_p, min_p = (arrays[name][:, None, None] for name in ("temperature", "top_k", "top_p", "min_p"))

    def filtered() -> Any:
        # At the lowest temperatures at least a few floats under the largest logit.
        reach = ops.maximum(LOWEST_EXPONENT * temperature, ops.abs(peak) * 1e-6 + 1e-30)
        lowest = ops.maximum(peak - reach, LOWEST)
        floor = _floor(logits, None, peak, temperature, top_k, lowest)
        # top_p is a share of what top-k has left.
        target = top_p * _sum(_over(logits, floor) * weights)
        floor = _floor(logits, weights, peak, temperature, target, floor)
        kept = _over(logits, floor) * weights
        return kept * (1.0 - _over(min_p, kept))

    weights = _weight(logits, peak, temperature)
    is_filtered = ops.isfinite(top_k) | ops.isfinite(top_p) | (min_p > 0)
    weights = ops.cond(ops.any(is_filtered), filtered, lambda: weights)
    return ops.reshape(weights, (-1, weights.shape[1] * weights.shape[2]))[:, :size]


def _sum(blocks: Any) -> Any:
    """Sums of rows `[B, blocks, width]`: `[B, 1, 1]`.

    In two steps: XLA turns the sum of a product into a scalar product, whose single running sum of 256,000 terms is off by 5e-5.
    """
    return ops.sum(ops.sum(blocks, axis=2, keepdims=True), axis=1, keepdims=True)


def _over(values: Any, bound: Any) -> Any:
    """1.0 where `values` are over `bound`, else 0.0.

    In float arithmetic: on CPU, torch and TensorFlow take several times as long for comparisons and `where`.
    """
    return ops.relu(ops.sign(values - bound))


def _weight(logits: Any, peak: Any, temperature: Any) -> Any:
    return ops.exp((logits - peak) / temperature)


def _floor(logits: Any, weights: Any, peak: Any, temperature: Any, target: Any, low: Any) -> Any:
    """A value `[B, 1, 1]` that is under the fewest largest logits weighing at least `target`, and not under the others.

    Args:
        logits: `[B, blocks, width]`.
        weights: of the logits; None counts them.
        peak: `[B, 1, 1]`, the largest logit.
        temperature: `[B, 1, 1]`.
        target: `[B, 1, 1]`; +inf switches a row off, which then gets `low`. So does a row whose logits all weigh less.
        low: `[B, 1, 1]`, under all logits that may be kept.

    Bisection instead of sorting: what lies over `low` weighs at least the target, what lies over `high` less. It ends as soon as
    no logit over `low` can be spared, as a rule after some 15 steps, or when no float is left between. One step reads the
    logits once; where all rows are off, there is none.
    """
    is_count = weights is None
    fixed = (logits, logits if is_count else weights, peak, temperature, target)

    def is_any_open(low: Any, high: Any, is_open: Any, is_first: Any) -> Any:
        return ops.any(is_open)

    # A copy: a recording in which two arguments are one tensor would serve the first step only.
    state = (low, ops.copy(peak), ops.isfinite(target), ops.ones_like(low, dtype="bool"))
    for middle, steps in ((_middle_value, STEPS_BY_VALUE), (_middle_float, STEPS_BY_BITS)):
        step = backend.repeated(functools.partial(_halve, is_count, middle), f"halve{middle.__name__}_{is_count}")
        state = ops.while_loop(is_any_open, functools.partial(step, *fixed), state, maximum_iterations=steps)
    return state[0]


def _halve(
    is_count: bool,
    middle: Callable[[Any, Any], Any],
    logits: Any,
    weights: Any,
    peak: Any,
    temperature: Any,
    target: Any,
    low: Any,
    high: Any,
    is_open: Any,
    is_first: Any,
) -> tuple[Any, Any, Any, Any]:
    """A step of `_floor`: the bounds, which rows go on, and that it is not the first."""
    value = ops.where(is_first, low, middle(low, high))  # is `low` low enough at all?
    mask = _over(logits, value)
    weight = _sum(mask if is_count else mask * weights)
    least = 1.0 if is_count else _weight(value, peak, temperature)  # what each logit over the value weighs
    is_enough, none_to_spare = weight >= target, weight - least < target
    between = ops.logical_and(value > low, value < high)
    is_needed = ops.where(is_first, is_enough, between)
    is_open = is_open & is_needed & ~(is_enough & none_to_spare)
    # Rows that are done may go on: what lies over their `low` does not change any more.
    low, high = ops.where(is_enough, value, low), ops.where(is_first | is_enough, high, value)
    return low, high, is_open, ops.zeros_like(is_first)


def _middle_value(low: Any, high: Any) -> Any:
    return low * 0.5 + high * 0.5


def _middle_float(low: Any, high: Any) -> Any:
    """The float in the middle of all floats from `low` to `high`; `low` where none is between."""
    a, b = _ordered(ops.view(low, "int32")), _ordered(ops.view(high, "int32"))
    # The mean, rounded down, without overflow.
    middle = ops.bitwise_and(a, b) + ops.right_shift(ops.bitwise_xor(a, b), 1)
    return ops.view(_ordered(middle), "float32")


def _ordered(bits: Any) -> Any:
    """A float's bits as an integer that is larger for a larger float, and back: negative floats count downwards."""
    return ops.where(bits < 0, ops.bitwise_xor(bits, 0x7FFFFFFF), bits)
