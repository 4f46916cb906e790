"""The products of `nm_matmul` as XLA's own dense dots on the masked weight, on any device.

Any N:M pattern, and no speed from it: this is the dense product that a sparse one has to beat.

Letters: M rows (tokens)   K contracted axis   N columns.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul.activations import apply_activation
from pallas_kernels.nm_matmul.call import (
    NMArrays,
    NMFacts,
    PackArrays,
    PackFacts,
    PruneArrays,
    PruneFacts,
)
from pallas_kernels.nm_matmul.mvue import prune_drawn, prune_tokens
from pallas_kernels.nm_matmul.packing import PackedNM, compress
from pallas_kernels.nm_matmul.straight_through import NMProducts, multiply_straight_through


def _mask_weight(w, mask):
    # Not a product: NaN * 0 is NaN, and -1 * 0 is -0.
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def _forward(x, w, mask, packed, bias, activation, keeps_z):
    z = jnp.einsum("mk,kn->mn", x, _mask_weight(w, mask), preferred_element_type=jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None]
    out = apply_activation(z, activation).astype(x.dtype)
    return out, z.astype(x.dtype) if keeps_z else None


def _input_gradient(dz, w, mask, packed):
    # Rounded by the product itself, which accumulates in f32 all the same: asked for f32, cuBLAS
    # would write that, and another pass would round it.
    return jnp.einsum("mn,kn->mk", dz, _mask_weight(w, mask))


def _weight_gradient(x, dz, draws, grad_pruning):
    return jnp.einsum("mk,mn->kn", x, prune_tokens(dz, draws, grad_pruning))


XLA_PRODUCTS = NMProducts(_forward, _input_gradient, _weight_gradient)
"""Products by masked dense dots: f32 accumulation, results rounded once to the dtype of x."""


def run(arrays: NMArrays, facts: NMFacts) -> jax.Array:
    """Multiply by the masked weight; the mask may keep anything, and `packed` is not read.

    Returns:
      float[M, N], or [M, N / 2] for a gated activation, typed like x.
    """
    return multiply_straight_through(arrays._replace(packed=None), facts, XLA_PRODUCTS)


def pack_weight(arrays: PackArrays, facts: PackFacts) -> PackedNM:
    """Pack a weight for sparse tensor cores, with the bits that the kernels make."""
    w, mask = arrays
    return PackedNM(
        compress(w.T, mask.T) if facts.along_k else None,
        compress(w, mask) if facts.along_n else None,
    )


def prune(arrays: PruneArrays, facts: PruneFacts) -> tuple[jax.Array, jax.Array]:
    """Prune by elementwise operations, which XLA fuses with what is around them.

    Returns:
      tuple of pruned, shaped and typed like x, and mask, bool shaped like x.
    """
    return prune_drawn(*arrays, axis=facts.axis, exact=facts.exact)
