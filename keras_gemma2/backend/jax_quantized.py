"""JAX: products with weights kept in 8 or 4 bits. The weights are widened; activations are never rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from keras_gemma2.backend.jax_blocks import blocked_product


def product(x: jax.Array, codes: jax.Array, scales: jax.Array, mode: str) -> jax.Array:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    if mode == "int8":
        out = blocked_product(rows, (codes,), _widened_int8) * scales[:, 0]
    else:
        out = blocked_product(rows, (codes, scales), _widened_int4)
    return out.reshape(*x.shape[:-1], codes.shape[0])


def _widened_int8(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _widened_int4(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 `[rows, in]`; the scales of the left half of the columns come first."""
    halves = jnp.stack([codes & 15, codes >> 4], axis=1).astype(jnp.int8) - 8
    groups = halves.reshape(codes.shape[0], scales.shape[1], -1).astype(jnp.float32)
    return (groups * scales[:, :, None]).reshape(codes.shape[0], -1)
