"""The gradient rule of `nm_matmul`, stated once for every backend that has its products.

  z = x (w * mask) + bias,  y = act(z)
  dz = act'(z) dy,  dx = dz (w * mask)^T,  dw = x^T S(dz),  dbias = sum dz

dw is dense: the mask stands in the way of the value and not of the gradient (straight-through).

Letters: M rows (tokens)   K contracted axis   N columns of the product.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul.activations import activation_gradient
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts


class NMProducts(NamedTuple):
    """The three products of one backend, as pure functions of arrays.

    Attributes:
      forward: (x[M, K], w[K, N], mask[K, N], packed, bias[N] or None, activation, keeps_z) ->
        (out, z), with out = act(z) and z[M, N], the pre-activation, both typed like x; z is None
        unless keeps_z.
      input_gradient: (dz[M, N], w, mask, packed) -> dx[M, K], typed like dz.
      weight_gradient: (x[M, K], dz[M, N], draws or None, grad_pruning) -> dw[K, N], typed like x,
        dense; dz pruned along M, see `mvue.take_bits`, unless grad_pruning is "none".
    """

    forward: Callable[..., tuple[jax.Array, jax.Array | None]]
    input_gradient: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]


def multiply_straight_through(arrays: NMArrays, facts: NMFacts, products: NMProducts) -> jax.Array:
    """Multiply with the first product of a backend and differentiate with its others.

    y = act(x (w * mask) + bias); gradients as in the module's docstring.

    Kept for the backward pass: the arrays, and z where there is an activation.

    Args:
      arrays: NMArrays; `packed` is handed to the products. Mask, packed and draws get no gradient.
      facts: NMFacts, static.
      products: NMProducts, static.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.
    """
    return _multiply(*arrays, products, facts.activation, facts.grad_pruning)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _multiply(x, w, mask, packed, bias, draws, products, activation, grad_pruning):
    return products.forward(x, w, mask, packed, bias, activation, False)[0]


def _multiply_fwd(x, w, mask, packed, bias, draws, products, activation, grad_pruning):
    keeps_z = activation is not None
    out, z = products.forward(x, w, mask, packed, bias, activation, keeps_z)
    return out, (x, w, mask, packed, bias, draws, z)


def _multiply_bwd(products, activation, grad_pruning, residuals, d_out):
    x, w, mask, packed, bias, draws, z = residuals
    dz = activation_gradient(z, d_out, activation)
    dx = products.input_gradient(dz, w, mask, packed)
    dw = products.weight_gradient(x, dz, draws, grad_pruning)
    d_bias = None
    if bias is not None:
        d_bias = dz.sum(axis=0, dtype=jnp.float32).astype(bias.dtype)
    return dx, dw, None, None, d_bias, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
