"""JAX: a part of the forward pass that is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope


def recomputed(function: Callable, seeds: list[keras.Variable], *tensors: Any) -> Any:
    """What a function gives, computed again in the backward pass; see `backend/torch_recompute.py` for the arguments."""
    if not in_stateless_scope():  # eager: nothing is differentiated, or the caller does so with values of its own
        return function(*tensors)
    outer = get_stateless_scope()

    @jax.checkpoint
    def run(states: list[jax.Array], *tensors: Any) -> tuple[Any, list[jax.Array]]:
        # What is assigned in here are tracers of this function, which may leave it as its results only.
        with keras.StatelessScope() as inner:
            inner.state_mapping.update(outer.state_mapping)
            for seed, state in zip(seeds, states):
                seed.assign(state)
            return function(*tensors), [seed.value for seed in seeds]

    result, states = run([seed.value for seed in seeds], *tensors)
    for seed, state in zip(seeds, states):
        seed.assign(state)
    return result
