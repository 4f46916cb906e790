"""SAT: block patterns from a learned low-rank model of the attention map, and the switch test.

`NB` is the number of blocks per side; leading axes (layers, heads) are independent.
"""

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("density", "causal"))
def sat_pattern(w_pattern: jax.Array, *, density: float, causal: bool = False) -> jax.Array:
    """Keep the largest blocks of the learned model of each layer's attention map.

    R = W W^T,  kept: the k = floor(density * visible) largest entries of R

    NB^2 blocks are visible, or the NB (NB + 1) / 2 on and below the diagonal if causal (ours). R is
    positive semidefinite, `|R_ij|^2 <= R_ii R_jj`, so diagonal blocks tend to come first; but none
    is forced, and a row of blocks may stay empty. R is symmetric, and so is the pattern, except for
    the last block where k splits a pair.

    Args:
      w_pattern: floating[..., NB, D], one vector per block of positions.
      density: fraction of the visible blocks to keep, in (0, 1].
      causal: whether only the lower triangle of blocks is visible (ours).

    Returns:
      bool[..., NB, NB], True = kept; exactly k blocks. Ties go to the earlier block in row order.

    Raises:
      ValueError: if `w_pattern` has fewer than two axes or is not floating, or the density is not
        in (0, 1] or keeps no block.

    Numerics:
      R is f32, whatever the device's default precision of products.

    References:
      Yoon et al., Exploring Attention Sparsity to Accelerate Transformer Training on GPUs, IEEE
      Access 12 (2024), doi:10.1109/ACCESS.2024.3425638, as in the released code.

    Example:
      >>> w = jnp.array([[2.0, 0], [1, 0], [0, 1]])
      >>> sat_pattern(w, density=0.5).astype(int)
      Array([[1, 1, 0],
             [1, 1, 0],
             [0, 0, 0]], dtype=int32)
    """
    if w_pattern.ndim < 2 or not jnp.issubdtype(w_pattern.dtype, jnp.floating):
        raise ValueError(
            "w_pattern must be floating[..., NB, D], got "
            f"{w_pattern.dtype} of shape {w_pattern.shape}"
        )
    num_blocks = w_pattern.shape[-2]
    num_kept = count_kept_blocks(num_blocks, density=density, causal=causal)
    scores = model_pooled_map(w_pattern)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((num_blocks, num_blocks), bool)), scores, -jnp.inf)
    flat = scores.reshape(*scores.shape[:-2], num_blocks**2)
    _, largest = jax.lax.top_k(flat, num_kept)
    kept = jnp.put_along_axis(jnp.zeros(flat.shape, bool), largest, True, -1, inplace=False)
    return kept.reshape(scores.shape)


def count_kept_blocks(num_blocks: int, *, density: float, causal: bool = False) -> int:
    """Return how many blocks `sat_pattern` keeps in each layer, at least 1.

    k = floor(density * visible)

    Raises:
      ValueError: if the density is not in (0, 1] or keeps no block.

    Example:
      >>> [count_kept_blocks(n, density=d) for n, d in [(32, 0.05), (32, 0.04), (64, 0.021)]]
      [51, 40, 86]
    """
    visible = num_blocks * (num_blocks + 1) // 2 if causal else num_blocks**2
    if not 0 < density <= 1 or math.floor(visible * density) < 1:
        raise ValueError(
            f"density must be at most 1 and at least {1 / visible:.4g}, one of {visible} visible "
            f"blocks, got density={density}"
        )
    return math.floor(visible * density)


def model_pooled_map(w_pattern: jax.Array) -> jax.Array:
    """Return the low-rank model of a block-pooled attention map.

    R = W W^T

    Args:
      w_pattern: floating[..., NB, D].

    Returns:
      floating[..., NB, NB], symmetric and positive semidefinite.

    References:
      SAT, as `sat_pattern`.

    Example:
      >>> model_pooled_map(jnp.array([[1.0, 2], [0, 3]]))
      Array([[5., 6.],
             [6., 9.]], dtype=float32)
    """
    return jnp.einsum(
        "...id,...jd->...ij", w_pattern, w_pattern, precision=jax.lax.Precision.HIGHEST
    )


def map_skewness(attention: jax.Array) -> jax.Array:
    """Return the skewness of the entries of an attention map.

    g = mean(((a - mean a) / std a)^3),  population standard deviation

    Args:
      attention: floating[..., T, S].

    Returns:
      f32[...], one number per leading index; NaN for a constant map.

    Numerics:
      f32 in two passes, mean first: power sums would cancel.

    References:
      SAT, as `sat_pattern`.

    Example:
      >>> round(float(map_skewness(jnp.array([[0.0, 0], [0, 1]]))), 4)
      1.1547
    """
    deviation = attention.astype(jnp.float32)
    deviation -= deviation.mean(axis=(-2, -1), keepdims=True)
    variance = (deviation**2).mean(axis=(-2, -1))
    return (deviation**3).mean(axis=(-2, -1)) / variance**1.5


def map_distance(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the Frobenius distance between two attention maps.

    ||new - old||_F

    Args:
      old: floating[..., T, S].
      new: floating[..., T, S].

    Returns:
      f32[...], one number per leading index.

    Numerics:
      f32.

    References:
      SAT, as `sat_pattern`; SPION, arXiv:2309.12578.

    Example:
      >>> map_distance(jnp.zeros((2, 2)), jnp.ones((2, 2)))
      Array(2., dtype=float32)
    """
    difference = new.astype(jnp.float32) - old.astype(jnp.float32)
    return jnp.sqrt((difference**2).sum(axis=(-2, -1)))
