"""JAX: products with weights kept in 8 or 4 bits. The weights are widened; activations are never rounded."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from keras_gemma2.backend.jax_blocks import blocked_product


@functools.partial(jax.jit, static_argnames="mode")  # called eagerly, its loops would be compiled anew each time
def product(x: jax.Array, codes: jax.Array, scales: jax.Array, mode: str) -> jax.Array:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    if mode == "int8":
        out = blocked_product(rows, (codes,), _widened_int8) * scales[:, 0]
    else:
        out = blocked_product(rows, (codes, scales), _widened_int4)
    return out.reshape(*x.shape[:-1], codes.shape[0])


def _widened_int8(codes: jax.Array) -> list[jax.Array]:
    return [codes.astype(jnp.float32)]


def _widened_int4(codes: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """The left half of the columns and the right half, `[rows, in / 2]` each; the scales of the left half come first."""
    groups = scales.shape[1] // 2

    def scaled(nibbles: jax.Array, scales: jax.Array) -> jax.Array:
        weights = nibbles.reshape(codes.shape[0], groups, -1).astype(jnp.float32) - 8
        return (weights * scales[:, :, None]).reshape(codes.shape)

    return [scaled(codes & 15, scales[:, :groups]), scaled(codes >> 4, scales[:, groups:])]
