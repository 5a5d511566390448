"""JAX: a loss over chunks of rows, with its gradient from the same pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import keras
from keras.src.backend.common.variables import AutocastScope

from keras_gemma2.backend import jax_spread


def sums_in_chunks(
    head: Callable,
    terms: Callable,
    count: int,
    variables: list[keras.Variable],
    hidden: jax.Array,
    targets: tuple[jax.Array, ...],
    weights: jax.Array,
    rows: int,
    training: bool,
) -> tuple[jax.Array, ...]:
    """Sums of a loss over rows; see `backend/torch_loss.py` for the arguments."""
    with AutocastScope(None):  # which would round the table as a whole
        values = [variable.value for variable in variables]
    trained = [i for i, variable in enumerate(variables) if variable.trainable]
    others = {i: value for i, value in enumerate(values) if i not in trained}

    @contextlib.contextmanager
    def reading(tables: tuple, others: dict) -> Iterator[None]:
        current = {**others, **dict(zip(trained, tables))}
        mapping = [(variable, current[i]) for i, variable in enumerate(variables)]
        with AutocastScope(None), keras.StatelessScope(state_mapping=mapping):
            yield

    def run(hidden, tables, others, targets, weights, differentiate):
        # On several devices each takes chunks of its own rows of data: [groups, rows, ...].
        groups = jax_spread.data_groups() if hidden.shape[0] % jax_spread.data_groups() == 0 else 1
        hidden, weights, *targets = (_in_groups(array, groups) for array in (hidden, weights, *targets))
        total, width = hidden.shape[1:]
        size = min(rows, total)
        # Rows that count first; then the rest, which no chunk comes to.
        order = jnp.argsort(weights == 0, axis=1, stable=True)
        order = jnp.concatenate([order, jnp.full((groups, -total % size), total, order.dtype)], axis=1)
        chunks = (jnp.max(jnp.sum(weights != 0, axis=1)) + size - 1) // size

        def body(i, carry):
            sums, gradients = carry
            index = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
            chunk, weight, *target = (_taken(array, index) for array in (hidden, weights, *targets))
            weight = jnp.where(index.reshape(-1) < total, weight, 0.0)
            if not differentiate:
                with reading(tables, others):
                    more, _ = terms(head(chunk), target, weight, False)
                return tuple(a + b for a, b in zip(sums, more, strict=True)), gradients

            def logits(tables: tuple, chunk: jax.Array) -> jax.Array:
                with reading(tables, others):
                    return head(chunk)

            raw, pull = jax.vjp(logits, tables, chunk)
            with reading(tables, others):
                more, upstream = terms(raw, target, weight, True)
            # XLA on CPU multiplies gradients [n, V] by the table [V, D] at a third of the speed of gradients [V, n].
            of_tables, of_chunk = pull(jax.lax.optimization_barrier(upstream.T).T)
            to_hidden, to_tables = gradients
            to_hidden = _stored(to_hidden, index, of_chunk.astype(jnp.float32))
            to_tables = tuple(a + b.astype(jnp.float32) for a, b in zip(to_tables, of_tables))
            return tuple(a + b for a, b in zip(sums, more, strict=True)), (to_hidden, to_tables)

        empty = (jnp.zeros((groups, total, width), jnp.float32), tuple(jnp.zeros(t.shape, jnp.float32) for t in tables))
        start = (jnp.zeros((), jnp.float32),) * count
        return jax.lax.fori_loop(0, chunks, body, (start, empty if differentiate else ()))

    @jax.custom_vjp
    def sums(hidden, tables, others, targets, weights):
        return run(hidden, tables, others, targets, weights, False)[0]

    def forward(*arguments):
        return run(*arguments, True)

    dtypes = hidden.dtype, [values[i].dtype for i in trained]

    def backward(gradients, upstream):
        to_hidden, to_tables = gradients
        to_tables = tuple((upstream[0] * table).astype(dtype) for table, dtype in zip(to_tables, dtypes[1]))
        to_hidden = (upstream[0] * to_hidden).astype(dtypes[0]).reshape(hidden.shape)
        return to_hidden, to_tables, None, None, None

    sums.defvjp(forward, backward)
    return sums(hidden, tuple(values[i] for i in trained), others, tuple(targets), weights)


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    """`[rows, ...] -> [groups, rows / groups, ...]`."""
    return jax_spread.in_groups(x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), groups)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of each group `[groups, rows, ...]` at `index [groups, n]`, together: `[groups * n, ...]`."""
    if x.shape[0] == 1:
        return jnp.take(x[0], index[0], axis=0, mode="clip")
    rows = jax.vmap(lambda array, some: jnp.take(array, some, axis=0, mode="clip"))(x, index)
    return rows.reshape(-1, *x.shape[2:])


def _stored(x: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """`_taken` the other way: rows `[groups * n, D]` written into `x [groups, rows, D]`."""
    if x.shape[0] == 1:
        return x.at[0, index[0]].set(rows, mode="drop")
    rows = rows.reshape(*index.shape, x.shape[-1])
    return jax.vmap(lambda array, some, new: array.at[some].set(new, mode="drop"))(x, index, rows)
