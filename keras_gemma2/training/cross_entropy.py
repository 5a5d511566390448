"""The next-token loss from hidden states, without the logits `[B, T, V]`.

Logits are made for a chunk of tokens at a time, and the chunk's gradient is taken from them at once (Hsu et al., "Liger Kernel",
arXiv 2410.10989, section 3.2): nothing is computed twice, and what is kept is the gradient of the hidden states, and of the
embedding where it is trained. A table that is frozen and in float32, as with LoRA, has a way of its own, which is faster and holds
a chunk's logits once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_gemma2 import backend

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
        Float32 scalars: "loss", the weighted sum of negative log-likelihoods, which can be differentiated with respect to `hidden`
        and the embedding's trainable variables; "nll", the same sum; "correct", the weight of tokens whose label has the largest
        logit; "weight", the sum of weights.
    """
    hidden = ops.reshape(hidden, (-1, hidden.shape[-1]))
    labels = ops.cast(ops.reshape(labels, (-1,)), "int32")
    weights = ops.cast(ops.reshape(weights, (-1,)), "float32")

    cap, rows, table = embedding.logit_soft_cap, rows_a_chunk(embedding.vocabulary_size), embedding.frozen_float32_table
    if table is not None and hidden.dtype == table.value.dtype:
        nll, correct = backend.frozen_sums_in_chunks(table, cap, hidden, labels, weights, rows, training)
    else:

        def terms(logits: Any, targets: Any, weights: Any, differentiate: bool) -> Any:
            return backend.label_terms(logits, *targets, weights, cap, differentiate)

        head, variables = embedding.uncapped_logits, embedding.variables
        nll, correct = backend.sums_in_chunks(head, terms, 2, variables, hidden, (labels,), weights, rows, training)
    return {"loss": nll, "nll": nll, "correct": correct, "weight": ops.sum(weights)}
