"""Drop and grow under an n:m pattern: every group of m weights always keeps n.

This is ours. Published methods choose among the weights of a whole layer, and an n:m pattern
chooses within each group. Here weights are dropped as in any layer, and each group grows as many
as it lost.

Legend: K rows and N columns of a weight, G = K / m groups, m entries of a group.
"""

import functools

import jax
import jax.numpy as jnp

from sparsejax.masks.weights.magnitude import rank_along
from sparsejax.masks.weights.selection import check_count, count_true, magnitude_mask, random_mask
from sparsejax.masks.weights.topology import Growth


@functools.partial(jax.jit, static_argnames=("n", "m", "growth", "mix"))
def drop_and_grow_nm(
    mask: jax.Array,
    *,
    n: int,
    m: int,
    weight: jax.Array,
    grad: jax.Array | None = None,
    num_drop: jax.typing.ArrayLike,
    growth: Growth = "gradient",
    mix: int = 3,
    key: jax.Array | None = None,
) -> jax.Array:
    """Drop the smallest weights of an n:m mask and grow as many in the groups that lost them.

    kept  = the (|mask| - num_drop) largest |weight| of the mask
    grown = in every group, as many as it lacks of n, just-dropped entries included:
      gradient  the largest |grad|
      random    uniformly at random
      mixed     floor(num_drop mix / (mix + 1)) of all by |grad|, then the rest at random

    Args:
      mask: bool[K, N], True = kept, n of every m consecutive along K; one layer.
      n: weights kept of a group.
      m: weights of a group; divides K.
      weight: floating[K, N]; read where the mask keeps.
      grad: floating[K, N], gradient of the dense weight; not read by "random".
      num_drop: integer[], entries to replace; a traced value does not recompile. Clamped to what
        the mask holds.
      growth: "gradient", "random" or "mixed".
      mix: entries grown by gradient for each grown at random, of "mixed" only.
      key: PRNG key of "random" and "mixed".

    Returns:
      bool[K, N], n of every m kept.

    Raises:
      ValueError: if shapes, n and m, or `growth` do not fit, or `grad` or `key` is missing where
        `growth` needs it.

    Example:
      >>> mask = jnp.array([[True], [True], [False], [False]])
      >>> weight, grad = jnp.array([[3.0], [1], [0], [0]]), jnp.array([[0.0], [0], [2], [5]])
      >>> drop_and_grow_nm(mask, n=2, m=4, weight=weight, grad=grad, num_drop=1)[:, 0].astype(int)
      Array([1, 0, 0, 1], dtype=int32)
    """
    if growth not in ("gradient", "random", "mixed"):
        known = "'gradient', 'random' or 'mixed'"
        raise ValueError(f"growth must be {known}, got growth={growth!r}")
    if mask.ndim != 2 or not 1 <= n <= m or mask.shape[0] % m:
        raise ValueError(
            f"mask must be bool[K, N] with K a multiple of m and 1 <= n <= m, got "
            f"mask.shape={mask.shape}, n={n}, m={m}"
        )
    if growth != "random" and (grad is None or grad.shape != mask.shape):
        got = None if grad is None else grad.shape
        raise ValueError(f"grad must have the shape of the mask, {mask.shape}, got {got}")
    choose = draw = None
    if growth != "gradient":
        if key is None:
            raise ValueError(f"key must be given for growth={growth!r}, got key=None")
        choose, draw = jax.random.split(key)

    (num_before,) = count_true(mask)
    num_drop = jnp.clip(check_count("num_drop", num_drop), 0, num_before)
    kept = magnitude_mask(weight, num_before - num_drop, among=mask)
    by_gradient = jnp.full(_group(mask, m).shape[::2], n)
    if choose is not None:
        share = {"random": num_drop, "mixed": -(-num_drop // (mix + 1))}[growth]
        at_random = random_mask(choose, mask.shape, share, among=mask & ~kept)
        by_gradient -= _group(at_random, m).sum(1)
    if grad is not None and growth != "random":
        kept = _fill(kept, jnp.abs(grad), by_gradient, m)
    if draw is not None:
        scores = jax.random.uniform(draw, mask.shape, jnp.float32)
        kept = _fill(kept, scores, jnp.full_like(by_gradient, n), m)
    return kept


def _fill(mask: jax.Array, scores: jax.Array, wanted_GN: jax.Array, m: int) -> jax.Array:
    """Add the largest scores to every group until it keeps as many as wanted."""
    kept_GmN, scores_GmN = _group(mask, m), _group(scores, m).astype(jnp.float32)
    scores_GmN = jnp.where(jnp.isnan(scores_GmN), jnp.inf, scores_GmN)
    scores_GmN = jnp.where(kept_GmN, -jnp.inf, scores_GmN)
    missing_G1N = wanted_GN[:, None] - kept_GmN.sum(1, keepdims=True)
    grown_GmN = ~kept_GmN & (rank_along(scores_GmN, 1) < missing_G1N)
    return (kept_GmN | grown_GmN).reshape(mask.shape)


def _group(x: jax.Array, m: int) -> jax.Array:
    return x.reshape(x.shape[0] // m, m, *x.shape[1:])
