"""The product with an N:M sparse weight as its equation, in f32: the oracle, gradients included.

Letters: M rows (tokens)   K contracted axis   N columns.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul.call import NMArrays, NMFacts
from pallas_kernels.nm_matmul.mvue import prune_tokens

_dot = functools.partial(jnp.dot, precision="highest")


def run(arrays: NMArrays, facts: NMFacts) -> jax.Array:
    """Multiply by a masked weight, straight through to the whole weight in the gradient.

    y = act(x (w * mask) + bias),  dx = dz (w * mask)^T,  dw = x^T S(dz),  dbias = sum dz

    Gradients are those of plain JAX, but for the masked weight and S. S
    prunes 2:4 along rows, or is the identity. The mask may keep anything, and `packed` is not read.

    Returns:
      float[M, N], or [M, N / 2] if gated, typed like x.

    References:
      FST, arXiv:2404.01847, equations 2 to 4.
    """
    x, w, mask, _, bias, draws = arrays
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    z = _dot(x32, _mask_weight(w32, mask))
    if facts.grad_pruning != "none":
        # The first product is the value and gives dx; the second is zero and gives dw.
        zero = _dot(jax.lax.stop_gradient(x32), _mask_weight(w32, jnp.zeros_like(mask)))
        z = _dot(x32, jax.lax.stop_gradient(_mask_weight(w32, mask)))
        z += jnp.asarray(_prune_gradient(zero, draws, facts.grad_pruning))
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None]
    if facts.activation == "gelu":
        z = _gelu(z)
    elif facts.activation is not None:
        value, gate = jnp.split(z, 2, axis=-1)
        z = value * (_gelu if facts.activation == "geglu" else jax.nn.silu)(gate)
    return z.astype(x.dtype)


def _gelu(z):
    # Not jax.nn.gelu: 1 + tanh(u) = 2 sigmoid(2 u) has no digits left far below zero, and its
    # gradient is NaN where z^3 overflows. Beyond 30 the sigmoid is 0 or 1 in f32.
    x = jnp.clip(z, -30, 30)
    return z * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@jax.custom_jvp
def _mask_weight(w, mask) -> jax.Array:
    # Not a product: NaN * 0 is NaN.
    return jnp.where(mask, w, 0)


@_mask_weight.defjvp
def _pass_all_gradients(primals, tangents):
    return _mask_weight(*primals), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _prune_gradient(z, draws, grad_pruning) -> jax.Array:
    return z


_prune_gradient.defvjp(
    lambda z, draws, grad_pruning: (z, draws),
    lambda grad_pruning, draws, dz: (prune_tokens(dz, draws, grad_pruning), None),
)
