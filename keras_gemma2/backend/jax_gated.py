"""JAX: the gated activation of a feed-forward layer, of which its arguments alone are kept."""

from __future__ import annotations

import jax

from keras_gemma2.backend.jax_recompute import recomputed


def gated_gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gelu_tanh(gate) * up`; see `backend/torch_gated.py`."""
    return recomputed(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up, [], gate, up)
