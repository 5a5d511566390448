"""The next-token loss from hidden states, without the logits `[B, T, V]`.

Logits are made for a chunk of tokens at a time, and the chunk's gradient is taken from them at once (Hsu et al., "Liger Kernel",
arXiv 2410.10989, section 3.2): nothing is computed twice, and what is kept is the gradient of the hidden states, and of the embedding
where it is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.numerics import soft_cap

CHUNK_BYTES = 1 << 26  # of float32 logits at a time
MAX_ROWS = 1024


def rows_a_chunk(vocabulary_size: int) -> int:
    """Tokens whose logits are in memory at once: a power of two, 64 for a vocabulary of 256,000."""
    return int(min(MAX_ROWS, max(1, 2 ** int(np.log2(max(1, CHUNK_BYTES / (4 * vocabulary_size)))))))


def next_token_sums(embedding: Any, hidden: Any, labels: Any, weights: Any, training: bool) -> dict[str, Any]:
    """Sums over tokens of the cross-entropy to their labels.

    Args:
        embedding: a `TiedEmbedding`.
        hidden: `[B, T, D]`, after the final norm.
        labels: int `[B, T]`. One outside the vocabulary makes the sums NaN, where its weight is not 0.
        weights: float `[B, T]`; tokens with weight 0 are left out of the computation.
        training: whether gradients will be asked for.

    Returns:
        Float32 scalars: "nll", the weighted sum of negative log-likelihoods, which can be differentiated with respect to `hidden`
        and the embedding's trainable variables; "correct", the weight of tokens whose label has the largest logit; "weight", the
        sum of weights.
    """
    hidden = ops.reshape(hidden, (-1, hidden.shape[-1]))
    labels = ops.cast(ops.reshape(labels, (-1,)), "int32")
    weights = ops.cast(ops.reshape(weights, (-1,)), "float32")

    def terms(logits: Any, labels: Any, weights: Any) -> tuple[Any, Any, Any]:
        return chunk_terms(logits, labels, weights, embedding.logit_soft_cap)

    rows = rows_a_chunk(embedding.vocabulary_size)
    variables = embedding.variables
    nll, correct = backend.sums_in_chunks(embedding.uncapped_logits, terms, variables, hidden, labels, weights, rows, training)
    return {"nll": nll, "correct": correct, "weight": ops.sum(weights)}


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
    capped = soft_cap(logits, cap)
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
