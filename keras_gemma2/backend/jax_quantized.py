"""JAX: products with weights kept in 8 or 4 bits.

int8 weights meet rows of whole numbers on CPU; elsewhere, and in 4 bits, weights are widened and activations never rounded.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_gemma2.backend.jax_blocks import blocked_product, gradient_to_rows, spread_product, whole

_BASE, _LARGEST = 254.0, 32_000.0  # of two digits between -127 and 127


@functools.partial(jax.jit, static_argnames=("mode", "spread"))  # called eagerly, its loops would be compiled anew each time
def product(x: jax.Array, codes: jax.Array, scales: jax.Array, mode: str, spread: bool = False) -> jax.Array:
    """`x [..., in]` times the quantized matrix transposed, in float32: `[..., out]`; `spread` if it lies on several devices."""
    rows = x.reshape(-1, x.shape[-1])
    if mode == "int4":
        out = (spread_product if spread else blocked_product)(rows, (codes, scales), _widened_int4)
    else:
        out = (spread_product(rows, (codes,), _widened_int8) if spread else _int8_product(rows, codes)) * scales[:, 0]
    return out.reshape(*x.shape[:-1], codes.shape[0])


@jax.custom_vjp
def _int8_product(rows: jax.Array, codes: jax.Array) -> jax.Array:
    """`rows [R, in]` times `codes [out, in]` transposed: float32 `[R, out]`."""
    return lax.platform_dependent(rows, codes, cpu=_in_digits, default=lambda rows, codes: whole(_widened_int8, rows, (codes,)))


def _in_digits(rows: jax.Array, codes: jax.Array) -> jax.Array:
    """XLA's CPU compiler has a product of 8-bit numbers: each row is written as whole numbers of two such digits.

    They reach up to `_LARGEST` of a row's largest magnitude; for numbers of a normal distribution that is 30 times finer than
    bfloat16.
    """
    rows = rows.astype(jnp.float32)
    # Not finite in, not finite out: the unit is then infinite or NaN.
    unit = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 2.0**-100) / _LARGEST
    whole_numbers = rows / unit
    high = jnp.round(whole_numbers / _BASE)
    low = jnp.round(whole_numbers - high * _BASE)
    digits = jnp.concatenate([high, low]).astype(jnp.int8)
    sums = lax.dot_general(digits, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)  # below 2**31
    high, low = jnp.split(sums.astype(jnp.float32), 2)
    return (high * _BASE + low) * unit


_int8_product.defvjp(
    lambda rows, codes: (_int8_product(rows, codes), (jnp.zeros((0,), rows.dtype), codes)),
    lambda kept, upstream: (gradient_to_rows(_widened_int8, upstream, (kept[1],)).astype(kept[0].dtype), None),
)


def _widened_int8(codes: jax.Array) -> list[jax.Array]:
    return [codes.astype(jnp.float32)]


def _widened_int4(codes: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """The left half of the columns and the right half, `[rows, in / 2]` each; the scales of the left half come first."""
    groups = scales.shape[1] // 2

    def scaled(nibbles: jax.Array, scales: jax.Array) -> jax.Array:
        weights = nibbles.reshape(codes.shape[0], groups, -1).astype(jnp.float32) - 8
        return (weights * scales[:, :, None]).reshape(codes.shape)

    return [scaled(codes & 15, scales[:, :groups]), scaled(codes >> 4, scales[:, groups:])]
