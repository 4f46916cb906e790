"""Activations of a feed-forward block that `nm_matmul` applies to its product, with gradients.

A gated activation takes the first half of its last axis as value and the second half as gate.

Letters: M rows   N columns of the product.
"""

import math

import jax
import jax.numpy as jnp

ACTIVATIONS = (None, "gelu", "geglu", "swiglu")
"""Names a caller may pass as `activation`."""

GATED = ("geglu", "swiglu")
"""Those whose result is half as wide as the product."""


def gelu_with_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the tanh form of GELU and its derivative.

    gelu(z) = z / 2 (1 + tanh(u)) = z / (1 + exp(-2 u)),  u = sqrt(2 / pi) (z + 0.044715 z^3)

    Args:
      z: f32[...].

    Returns:
      tuple of f32[...], gelu(z), and f32[...], its derivative.

    Numerics:
      As for `silu_with_slope`.
    """
    linear = 2 * math.sqrt(2 / math.pi)
    cubic = 0.044715 * linear
    value = z / (1 + jnp.exp(-z * (linear + cubic * (z * z))))
    # Beyond 16 the slope is 0 or 1 in f32. The bound keeps z * z finite, and inf * 0 away.
    size = jnp.minimum(jnp.abs(z), 16.0)
    square = size * size
    exponent, growth = (size * (linear + n * cubic * square) for n in (1, 3))
    return value, _slope(z, exponent, growth)


def silu_with_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute SiLU and its derivative.

    silu(z) = z / (1 + exp(-z))

    Args:
      z: f32[...].

    Returns:
      tuple of f32[...], silu(z), and f32[...], its derivative.

    Numerics:
      Right to a few roundings, and to that of the exponent: also far below zero, where both results
      are tiny and `1 + tanh` would have no digits left. What is smaller than 1e-35 may be 0.
      Finite for every finite z. As in JAX, silu(-inf) is NaN.
    """
    size = jnp.minimum(jnp.abs(z), 128.0)
    return z / (1 + jnp.exp(-z)), _slope(z, size, size)


def _slope(z, exponent, growth):
    """Differentiate z sigmoid(t): sigmoid(t) + z t' sigmoid(t) sigmoid(-t).

    `exponent` is |t| and `growth` |z t'|. Of |t| the exponential cannot overflow, and neither
    sigmoid is a difference.
    """
    e = jnp.exp(-exponent)
    inverse = 1 / (1 + e)
    product = growth * e * inverse
    return inverse * jnp.where(z >= 0, 1 + product, e - product)


def _with_slope(z, name):
    return silu_with_slope(z) if name == "swiglu" else gelu_with_slope(z)


def apply_activation(z: jax.Array, name: str | None) -> jax.Array:
    """Apply an activation by name.

    None: z,  "gelu": gelu(z),  "geglu": value * gelu(gate),  "swiglu": value * silu(gate)

    Args:
      z: float[..., N], pre-activation; N is even for a gated activation.
      name: str or None, one of `ACTIVATIONS`.

    Returns:
      float[..., N], or [..., N / 2] if gated, typed like z.

    Numerics:
      Computed in f32, rounded to the dtype of z last.

    References:
      Shazeer, arXiv:2002.05202, for GEGLU and SwiGLU; FST, arXiv:2404.01847, for the order of the
      halves.
    """
    if name is None:
        return z
    x = z.astype(jnp.float32)
    if name not in GATED:
        return _with_slope(x, name)[0].astype(z.dtype)
    value, gate = jnp.split(x, 2, axis=-1)
    return (value * _with_slope(gate, name)[0]).astype(z.dtype)


def activation_gradient(z: jax.Array, d_out: jax.Array, name: str | None) -> jax.Array:
    """Take the gradient of a result back to the pre-activation.

    dz = act'(z) d_out;  gated: dz = [d_out act(gate), d_out value act'(gate)]

    Args:
      z: float[..., N], pre-activation; not read where `name` is None.
      d_out: float[..., N], or [..., N / 2] if gated, gradient of the result.
      name: str or None, one of `ACTIVATIONS`.

    Returns:
      float[..., N], typed like d_out.

    Numerics:
      Computed in f32, rounded to the dtype of d_out last.
    """
    if name is None:
        return d_out
    if name not in GATED:
        slope = _with_slope(z.astype(jnp.float32), name)[1]
        return (d_out.astype(jnp.float32) * slope).astype(d_out.dtype)

    def of_value(z, d_out):
        _, gate = jnp.split(z.astype(jnp.float32), 2, axis=-1)
        return (d_out.astype(jnp.float32) * _with_slope(gate, name)[0]).astype(d_out.dtype)

    def of_gate(z, d_out):
        value, gate = jnp.split(z.astype(jnp.float32), 2, axis=-1)
        slope = _with_slope(gate, name)[1]
        return (d_out.astype(jnp.float32) * value * slope).astype(d_out.dtype)

    # Behind a barrier the halves share nothing, and XLA makes both and joins them in one pass over
    # a GPU's memory; what they shared would be written first.
    again = jax.lax.optimization_barrier((z, d_out))
    return jnp.concatenate([of_value(z, d_out), of_gate(*again)], axis=-1)
