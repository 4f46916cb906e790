"""Masks that are 2:4 along rows and along columns: the weight and its transpose are both sparse."""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.meshes import name_axes, run_on_mesh, vary_like
from pallas_kernels.transposable_mask.backends import BACKENDS
from pallas_kernels.transposable_mask.call import TILE, TransposableArrays, TransposableFacts


def transposable_mask(w: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """Keep two of four along both axes, with the largest sum of magnitudes.

    mask of a tile = argmax over P of sum_ij P_ij |w_ij|,  P in {0, 1}^(4 x 4) with two ones in
    every row and in every column

    The search takes the best of all 90 such P for each tile of 4 x 4 weights. Ties go to the P
    whose kept entries come first in row order; this order is ours. Gaussian weights keep 0.7024 of
    their L1 mass, against 0.7445 if only rows are constrained. No gradient passes.

    Magnitudes of 2^124 and more (f64: 2^1020), infinities and NaN count as 2^124: a tile keeps as
    many NaNs as a legal pattern can, so that they show in the product instead of being masked away.

    Args:
      w: floating[..., K, N], K and N multiples of 4; leading axes are layers.
      implementation: "triton", one kernel that reads w once, for bf16, f16 and f32 on NVIDIA GPUs
        since Ampere; "xla", the same arithmetic on any device; "reference", which tries every P;
        or None: the kernel where it was proven and is faster, else "xla". A named one runs or
        raises.

    Returns:
      bool[..., K, N], True = kept.

    Raises:
      ValueError: if w is not floating, has fewer than two axes, is empty, or K or N is not a
        multiple of 4, or the name is unknown.
      NotImplementedError: if the kernel is named and does not run on the device, or not with this
        dtype; the message says which.

    Numerics:
      The eight magnitudes are added pair by pair in f32 at least (f64 for f64), in one order for
      "xla" and "triton": they choose the same on every device, jitted or mapped, unless sums are
      subnormal, which some devices flush to zero. The kept sum is within 4e-7 of the largest. Sums
      of bf16 are exact, with the ties of exact arithmetic, unless magnitudes in one tile differ by
      more than 2^13.

    References:
      Hu et al., FST, arXiv:2404.01847: the search as a convolution with 90 filters.

    Example:
      Rows alone would keep the first two columns throughout.

      >>> w = jnp.array([[9.0, 8, 0, 1], [8, 9, 1, 0], [7, 6, 5, 4], [6, 7, 4, 5]])
      >>> transposable_mask(w).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [0, 0, 1, 1],
             [0, 0, 1, 1]], dtype=int32)
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating, got w.dtype={w.dtype}")
    if w.ndim < 2 or 0 in w.shape or w.shape[-2] % TILE or w.shape[-1] % TILE:
        raise ValueError(
            f"w must be [..., K, N] with K and N positive multiples of 4, got w.shape={w.shape}"
        )

    def search(w, *, whole):
        w_KN = jax.lax.stop_gradient(w).reshape(-1, w.shape[-1])
        facts = TransposableFacts(rows=w_KN.shape[0], columns=w_KN.shape[1], dtype=w.dtype.name)
        backend = choose_backend("transposable_mask", BACKENDS, implementation, facts, whole=whole)
        mask = backend.run(TransposableArrays(w_KN), facts).reshape(w.shape)
        return (vary_like(mask, w),)

    layers = name_axes(w.ndim - 2)
    axes = layers + "KN"
    parts = dict.fromkeys(layers, 1) | {"K": TILE, "N": TILE}
    (mask,) = run_on_mesh(search, (w,), (axes,), (axes,), parts=parts)
    return mask
