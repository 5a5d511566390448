"""TensorFlow: a part of the forward pass that is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def recomputed(function: Callable, seeds: list[keras.Variable], *tensors: Any) -> Any:
    """What a function gives, computed again in the backward pass; see `backend/torch_recompute.py` for the arguments."""
    states = [tf.identity(seed.value) for seed in seeds]

    def run(*tensors: Any) -> Any:
        for seed, state in zip(seeds, states):
            seed.assign(state)
        return function(*tensors)

    return tf.recompute_grad(run)(*tensors)
