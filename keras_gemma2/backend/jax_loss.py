"""JAX: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import keras
from keras.src.backend.common.variables import AutocastScope

from keras_gemma2.backend.loss_terms import chunk_terms


def sums_in_chunks(
    head: Callable,
    cap: float | None,
    variables: list[keras.Variable],
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    rows: int,
    training: bool,
) -> tuple[jax.Array, jax.Array]:
    """Sums of a loss over rows; see `backend/torch_loss.py` for the arguments."""
    with AutocastScope(None):  # which would round the table as a whole
        values = [variable.value for variable in variables]
    trained = [i for i, variable in enumerate(variables) if variable.trainable]
    others = {i: value for i, value in enumerate(values) if i not in trained}

    def logits(tables: tuple, others: dict, chunk: jax.Array) -> jax.Array:
        current = {**others, **dict(zip(trained, tables))}
        mapping = [(variable, current[i]) for i, variable in enumerate(variables)]
        with keras.StatelessScope(state_mapping=mapping), AutocastScope(None):
            return head(chunk)

    def run(hidden, tables, others, labels, weights, differentiate):
        count, width = hidden.shape
        size = min(rows, count)
        # Rows that count first; then the rest, which no chunk comes to.
        order = jnp.argsort(weights == 0, stable=True)
        order = jnp.concatenate([order, jnp.full(-count % size, count, order.dtype)])
        chunks = (jnp.sum(weights != 0) + size - 1) // size

        def body(i, carry):
            nll, correct, gradients = carry
            index = jax.lax.dynamic_slice_in_dim(order, i * size, size)
            here = index < count
            chunk, weight = jnp.take(hidden, index, axis=0, mode="clip"), jnp.take(weights, index, mode="clip")
            label, weight = jnp.take(labels, index, mode="clip"), jnp.where(here, weight, 0.0)
            if not differentiate:
                more_nll, more_correct, _ = chunk_terms(logits(tables, others, chunk), label, weight, cap)
                return nll + more_nll, correct + more_correct, gradients
            raw, pull = jax.vjp(lambda tables, chunk: logits(tables, others, chunk), tables, chunk)
            more_nll, more_correct, upstream = chunk_terms(raw, label, weight, cap)
            # XLA on CPU multiplies gradients [n, V] by the table [V, D] at a third of the speed of gradients [V, n].
            of_tables, of_chunk = pull(jax.lax.optimization_barrier(upstream.T).T)
            to_hidden, to_tables = gradients
            to_hidden = to_hidden.at[index].set(of_chunk.astype(jnp.float32), mode="drop")
            to_tables = tuple(a + b.astype(jnp.float32) for a, b in zip(to_tables, of_tables))
            return nll + more_nll, correct + more_correct, (to_hidden, to_tables)

        zero = jnp.zeros((), jnp.float32)
        empty = (jnp.zeros((count, width), jnp.float32), tuple(jnp.zeros(t.shape, jnp.float32) for t in tables))
        return jax.lax.fori_loop(0, chunks, body, (zero, zero, empty if differentiate else ()))

    @jax.custom_vjp
    def sums(hidden, tables, others, labels, weights):
        return run(hidden, tables, others, labels, weights, False)[:2]

    def forward(*arguments):
        nll, correct, gradients = run(*arguments, True)
        return (nll, correct), gradients

    dtypes = hidden.dtype, [values[i].dtype for i in trained]

    def backward(gradients, upstream):
        to_hidden, to_tables = gradients
        to_tables = tuple((upstream[0] * table).astype(dtype) for table, dtype in zip(to_tables, dtypes[1]))
        return (upstream[0] * to_hidden).astype(dtypes[0]), to_tables, None, None, None

    sums.defvjp(forward, backward)
    return sums(hidden, tuple(values[i] for i in trained), others, labels, weights)
