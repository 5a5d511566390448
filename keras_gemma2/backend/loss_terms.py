"""The cross-entropy of a chunk of logits and its gradient, for the compilers of JAX and TensorFlow."""

from __future__ import annotations

from typing import Any

from keras import ops


def chunk_terms(logits: Any, labels: Any, weights: Any, cap: float | None) -> tuple[Any, Any, Any]:
    """The loss of a chunk and its gradient.

    Args:
        logits: float32 `[n, V]`, before the soft cap.
        labels: int32 `[n]`.
        weights: float32 `[n]`.
        cap: of the logits; None for none.

    Returns:
        Float32: the weighted sum of negative log-likelihoods, the weight of tokens that are right (the label's logit is the
        largest, or ties with it), and the gradient `[n, V]` of the first with respect to the logits.
    """
    capped = logits if cap is None else cap * ops.tanh(logits / cap)
    counts = weights != 0
    known = ops.logical_and(labels >= 0, labels < logits.shape[-1])
    labels = ops.where(known, labels, 0)
    highest = ops.max(capped, axis=-1, keepdims=True)
    exponentials = ops.exp(capped - highest)
    total = ops.sum(exponentials, axis=-1, keepdims=True)
    label_logits = ops.take_along_axis(capped, labels[:, None], axis=-1)
    nll = ops.where(known, (ops.log(total) + highest - label_logits)[:, 0], float("nan"))
    right = ops.logical_and(label_logits[:, 0] >= highest[:, 0], counts)
    is_label = ops.arange(logits.shape[-1], dtype="int32")[None] == labels[:, None]
    gradient = exponentials / total - ops.cast(is_label, "float32")
    if cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / cap))
    gradient = ops.where(counts[:, None], gradient * weights[:, None], 0.0)
    return ops.sum(ops.where(counts, nll * weights, 0.0)), ops.sum(ops.where(right, weights, 0.0)), gradient
