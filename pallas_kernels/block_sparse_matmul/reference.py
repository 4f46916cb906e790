"""The product with a block-sparse weight as its equation, in f32: the oracle, gradients included.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts


def run(arrays: BlockArrays, facts: BlockFacts) -> jax.Array:
    """Multiply by a masked weight whose gradient has a mask of its own.

    y = x (w * mask) + bias,  dx = dy (w * mask)^T,  dw = (x^T dy) * grad_mask

    Gradients are those of plain JAX, but for a zero whose cotangent is kept.

    Returns:
      float[M, N], typed like x.
    """
    del facts
    x, w, mask, grad_mask, bias = arrays
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    kept = jax.lax.stop_gradient(jnp.where(expand(mask, w.shape), w32, 0))
    # The first product is the value and gives dx; the second is zero and gives dw.
    wanted = jnp.where(expand(grad_mask, w.shape), _zeros_with_gradient(w32), 0)
    y = jnp.dot(x32, kept, precision="highest")
    y += jnp.dot(jax.lax.stop_gradient(x32), wanted, precision="highest")
    if bias is not None:
        y += bias.astype(jnp.float32)[None]
    return y.astype(x.dtype)


def expand(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the mask of every weight.

    Args:
      mask: bool[I, J].
      shape: (K, N), multiples of (I, J).

    Returns:
      bool[K, N].
    """
    rows, columns = shape[0] // mask.shape[0], shape[1] // mask.shape[1]
    return mask.repeat(rows, axis=0).repeat(columns, axis=1)


@jax.custom_vjp
def _zeros_with_gradient(w) -> jax.Array:
    # Not w - stop_gradient(w), which is NaN where w is.
    return jnp.zeros_like(w)


_zeros_with_gradient.defvjp(lambda w: (jnp.zeros_like(w), None), lambda _, dw: (dw,))
