"""JAX: the loss over chunks of rows where the table is frozen and in float32, as with LoRA.

Logits are made transposed, `[V, n]`: on CPUs XLA is faster both ways then (for 64 rows 186 and 149 GFLOP/s, against 142 and 57),
and their gradient takes their place in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import keras
from keras.src.backend.common.variables import AutocastScope

from keras_gemma2.backend.loss_terms import label_terms


def frozen_sums_in_chunks(
    table: keras.Variable, cap: float | None, hidden: jax.Array, labels: jax.Array, weights: jax.Array, rows: int, training: bool
) -> tuple[jax.Array, jax.Array]:
    """Sums of a loss over rows; see `backend/torch_frozen_loss.py` for the arguments."""
    with AutocastScope(None):
        table = table.value

    def run(hidden, table, labels, weights, differentiate):
        count = hidden.shape[0]
        size = min(rows, count)
        # Rows that count first; then the rest, which no chunk comes to.
        order = jnp.argsort(weights == 0, stable=True)
        order = jnp.concatenate([order, jnp.full(-count % size, count, order.dtype)])
        chunks = (jnp.sum(weights != 0) + size - 1) // size

        def body(i, carry):
            nll, correct, to_hidden = carry
            index = jax.lax.dynamic_slice_in_dim(order, i * size, size)
            chunk, label = jnp.take(hidden, index, axis=0, mode="clip"), jnp.take(labels, index, mode="clip")
            weight = jnp.where(index < count, jnp.take(weights, index, mode="clip"), 0.0)
            logits = jax.lax.dot_general(table, chunk, (((1,), (1,)), ((), ())))
            (more_nll, more_correct), upstream = label_terms(logits, label, weight, cap, differentiate, axis=0)
            if differentiate:
                of_chunk = jax.lax.dot_general(upstream, table, (((0,), (0,)), ((), ())))
                to_hidden = to_hidden.at[index].set(of_chunk, mode="drop")
            return nll + more_nll, correct + more_correct, to_hidden

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.fori_loop(0, chunks, body, (zero, zero, jnp.zeros_like(hidden) if differentiate else ()))

    @jax.custom_vjp
    def sums(hidden, table, labels, weights):
        return run(hidden, table, labels, weights, False)[:2]

    def forward(*arguments):
        nll, correct, to_hidden = run(*arguments, True)
        return (nll, correct), to_hidden

    sums.defvjp(forward, lambda to_hidden, upstream: (upstream[0] * to_hidden, None, None, None))
    return sums(hidden, table, labels, weights)
