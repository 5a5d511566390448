"""TensorFlow and PyTorch: Keras's own steps, which change variables in place."""

from __future__ import annotations


class CompilesSteps:
    """Mixed in before `keras.Model`; on JAX it keeps weights that do not change from being copied (`jax_steps.py`)."""
