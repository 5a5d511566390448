"""Where half precision needs help: the float32 islands and float16's narrow range; and the sizes of tensors that have none yet."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

FLOAT16_MAX = 65504.0


def stream_dtype(compute_dtype: str) -> str:
    """The dtype of the residual stream: float32 under float16, else the compute dtype.

    The residual stream of the larger Gemma 2 models passes float16's 65504 (Hugging Face's model card tells users to avoid
    float16); its branches are normalized before each product, so only the sum itself needs the range.
    """
    return "float32" if compute_dtype == "float16" else compute_dtype


def saturating_cast(x: Any, dtype: str) -> Any:
    """Casts, to float16 through its finite range: a larger number becomes 65504 instead of infinity."""
    return ops.cast(ops.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if dtype == "float16" else x, dtype)


def saturate(x: Any) -> Any:
    """Clips a float16 tensor to its finite range; other dtypes pass unchanged.

    An overflow then costs accuracy in one element, which the next norm scales down, and never becomes inf - inf = NaN.
    """
    if keras.backend.standardize_dtype(x.dtype) != "float16":
        return x
    return ops.clip(x, -FLOAT16_MAX, FLOAT16_MAX)


def soft_cap(x: Any, cap: float | None) -> Any:
    """`cap * tanh(x / cap)`, or x itself if cap is None (technical report, section 2: logit soft-capping)."""
    return x if cap is None else cap * ops.tanh(x / cap)


def leading_sizes(x: Any, first: int, second: int) -> tuple[Any, Any]:
    """The sizes of two axes of x, for `reshape`: -1 where only the first is unknown, which saves a graph its computation."""
    if x.shape[first] is None and x.shape[second] is not None:
        return -1, x.shape[second]
    sizes = ops.shape(x)
    return sizes[first], sizes[second]
