"""What a chunk's logits give: sums of losses, and the gradient of the first of them."""

from __future__ import annotations

from typing import Any

from keras import ops


def label_terms(
    logits: Any, labels: Any, weights: Any, cap: float | None, differentiate: bool = True, axis: int = 1
) -> tuple[tuple[Any, Any], Any]:
    """The cross-entropy of a chunk to its labels.

    Args:
        logits: float32 `[n, V]`, or `[V, n]` with `axis=0`, before the soft cap.
        labels: int32 `[n]`.
        weights: float32 `[n]`.
        cap: of the logits; None for none.
        differentiate: whether the gradient is wanted.
        axis: that of the vocabulary.

    Returns:
        Float32: the weighted sum of negative log-likelihoods, the weight of tokens that are right (the label's logit is the
        largest, or ties with it); and the gradient of the first with respect to the logits, or None.
    """
    capped = logits if cap is None else cap * ops.tanh(logits / cap)
    counts = weights != 0
    known = ops.logical_and(labels >= 0, labels < logits.shape[axis])
    labels = ops.expand_dims(ops.where(known, labels, 0), axis)
    highest = ops.max(capped, axis=axis, keepdims=True)
    exponentials = ops.exp(capped - highest)
    total = ops.sum(exponentials, axis=axis, keepdims=True)
    label_logits = ops.take_along_axis(capped, labels, axis=axis)
    nll = ops.where(known, ops.squeeze(ops.log(total) + highest - label_logits, axis), float("nan"))
    right = ops.logical_and(ops.squeeze(label_logits >= highest, axis), counts)
    sums = ops.sum(ops.where(counts, nll * weights, 0.0)), ops.sum(ops.where(right, weights, 0.0))
    if not differentiate:
        return sums, None
    is_label = ops.expand_dims(ops.arange(logits.shape[axis], dtype="int32"), 1 - axis) == labels
    gradient = exponentials / total - ops.cast(is_label, "float32")
    if cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / cap))
    return sums, ops.where(ops.expand_dims(counts, axis), gradient * ops.expand_dims(weights, axis), 0.0)
