"""Random initial weights, made in blocks of rows."""

from __future__ import annotations

import contextlib
import contextvars
import math
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_gemma2 import backend

ELEMENTS_A_BLOCK = 1 << 22  # 16 MiB of float32 at a time: the rest of the tensor is never held twice
_SKIP_RANDOM = contextvars.ContextVar("skip_random", default=False)


@contextlib.contextmanager
def skip_random_weights() -> Iterator[None]:
    """A context in which `FanInNormal` gives memory as it comes: for weights that a checkpoint overwrites next."""
    token = _SKIP_RANDOM.set(True)
    try:
        yield
    finally:
        _SKIP_RANDOM.reset(token)


def random_weights_are_skipped() -> bool:
    """Whether this is inside `skip_random_weights`."""
    return _SKIP_RANDOM.get()


def row_blocks_of(initializer: Any, shape: tuple[int, int], dtype: str) -> Iterator[np.ndarray]:
    """Consecutive rows of what an initializer gives; those of `FanInNormal` are made when they are asked for."""
    if isinstance(initializer, FanInNormal):
        yield from initializer.row_blocks(shape)
    else:
        yield from backend.numpy_row_blocks(keras.ops.convert_to_tensor(initializer(shape, dtype=dtype)), shape[0])


@keras.saving.register_keras_serializable(package="keras_gemma2")
class FanInNormal(keras.initializers.Initializer):
    """Normal weights with standard deviation `1 / sqrt(shape[-1])`, for tensors stored `[out, in]`.

    One rule serves the projections, whose last axis is their fan-in, and the tied embedding, whose rows come out at unit
    length per hidden unit after the multiplication by `sqrt(hidden_dim)`. The same seed gives the same values on every
    backend and in every dtype (up to rounding). Memory beyond the tensor itself stays at one block of rows: keras's own
    initializers draw the 27B's 1.2-billion-element embedding in float32 first.

    Args:
        seed: int, or None for one drawn from Python's generator, which `keras.utils.set_random_seed` seeds.

    Example:
        >>> kernel = FanInNormal(seed=0)((8, 4), "bfloat16")
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape: tuple[int, ...], dtype: Any = None, **kwargs: Any) -> Any:
        shape = tuple(shape)
        dtype = keras.backend.standardize_dtype(dtype)
        if _SKIP_RANDOM.get():
            return backend.untouched_tensor(shape, dtype)
        return backend.tensor_from_row_blocks(self.row_blocks(shape), shape, dtype)

    def row_blocks(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The values in consecutive blocks of rows, in float32."""
        generator = np.random.Generator(np.random.Philox(self.seed))
        scale = np.float32(1.0 / math.sqrt(shape[-1]))
        rows = max(1, ELEMENTS_A_BLOCK // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            block = generator.standard_normal((min(rows, shape[0] - start), *shape[1:]), dtype=np.float32)
            yield np.multiply(block, scale, out=block)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def clone(self) -> FanInNormal:
        """A fresh initializer: another draw where no seed was given."""
        return type(self)()
