"""Backends whose arrays lie on one device each: what `jax_spread.py` does, there being nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops


def is_spread() -> bool:
    """Whether a distribution over several devices is set."""
    return False


def local_groups() -> int:
    """Among how many groups of devices the rows of a batch are split."""
    return 1


def check_alike(text: str, rule: str = "") -> None:
    """Compares a text on all processes that hold one model between them; here each has its own."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context for what all processes do, each its part; here each does all for itself."""
    yield


def empty_cache(shape: tuple[int, int, int, int], dtype: str) -> Any:
    """Zeros `[B, K, S, H]`."""
    return ops.zeros(shape, dtype)


def stored_like(leaf: Any, variable: Any) -> Any:
    """How Orbax is to read an array: as numpy's.

    Args:
        leaf: its metadata.
        variable: where it goes.
    """
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if hasattr(leaf, "dtype") else leaf


def own_region(variable: Any) -> None:
    """The part of a variable that this process holds; None for all of it."""
    return None


def whole_array(variable: Any) -> np.ndarray:
    """A variable's value as a numpy array."""
    return ops.convert_to_numpy(variable)


@contextlib.contextmanager
def writing(variables: Any) -> Iterator[bool]:
    """A context for writing; the process is the one to write."""
    yield True
