"""The product with a block-sparse weight as its equation, in f32: the oracle, gradients included.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts


def run(arrays: BlockArrays, facts: BlockFacts) -> jax.Array:
    """Multiply by a masked weight whose gradient has a mask of its own.

    y = x (w * mask) + bias,  dx = dy (w * mask)^T,  dw = (x^T dy) * grad_mask

    Gradients are those of plain JAX, but for the masked weight, whose own has another mask.

    Returns:
      float[M, N], typed like x.
    """
    del facts
    x, w, mask, grad_mask, bias = arrays
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    kept = _mask_weight(w32, expand(mask, w.shape), expand(grad_mask, w.shape))
    y = jnp.dot(x32, jnp.asarray(kept), precision="highest")
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


@jax.custom_jvp
def _mask_weight(w, kept, wanted) -> jax.Array:
    # Not a product: NaN * 0 is NaN.
    return jnp.where(kept, w, 0)


@_mask_weight.defjvp
def _pass_wanted_gradients(primals, tangents):
    _, _, wanted = primals
    return _mask_weight(*primals), jnp.where(wanted, tangents[0], 0)
