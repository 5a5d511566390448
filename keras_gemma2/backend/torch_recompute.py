"""PyTorch: a part of the forward pass that is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, seeds: list[keras.Variable], *tensors: Any) -> Any:
    """What a function gives; of what it computes on the way, only its arguments are kept until the backward pass.

    Args:
        function: gives a tensor. What it draws must be the same when it is called again with the same seeds.
        seeds: states of random generators that it moves on.
        tensors: its arguments.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    states = [seed.value.clone() for seed in seeds]

    def run(*tensors: Any) -> Any:
        for seed, state in zip(seeds, states):
            seed.assign(state)
        return function(*tensors)

    return checkpoint(run, *tensors, use_reentrant=False) if torch.is_grad_enabled() else run(*tensors)
