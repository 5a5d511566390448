"""TensorFlow and PyTorch: Keras's own steps, which change variables in place."""

from __future__ import annotations

import contextlib


class CompilesSteps:
    """Mixed in before `keras.Model`; on JAX it keeps weights that do not change from being copied (`jax_steps.py`)."""

    def keeping_values(self) -> contextlib.AbstractContextManager[None]:
        """A context in which an exception leaves variables their values, as it does here anyway."""
        return contextlib.nullcontext()
