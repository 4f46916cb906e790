"""Drop and grow entries of a mask, and update weights and moments to match.

One function drops and grows for all methods: SET grows at random, RigL by the gradient, MST mixes
both.

An array is one layer: map over stacked layers with `jax.vmap`, each with its own counts and key. A
mask of blocks has one entry per block and takes the `block_scores` of weights and gradients.

Legend: K rows and N columns of a weight, I x J blocks.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from sparsejax.masks.weights.selection import check_count, count_true, magnitude_mask, random_mask
from sparsejax.types import PyTree

type Growth = Literal["gradient", "random", "mixed"]
"""How `drop_and_grow` chooses what grows."""


@functools.partial(jax.jit, static_argnames=("growth", "mix"))
def drop_and_grow(
    mask: jax.Array,
    *,
    weight: jax.Array,
    grad: jax.Array | None = None,
    num_drop: jax.typing.ArrayLike,
    num_grow: jax.typing.ArrayLike,
    growth: Growth = "gradient",
    mix: int = 3,
    key: jax.Array | None = None,
) -> jax.Array:
    """Drop the smallest weights of a mask and grow other entries.

    kept  = the (|mask| - num_drop) largest |weight| of the mask
    grown = num_grow of what is not kept, just-dropped entries included:
      gradient  the largest |grad|
      random    uniformly at random
      mixed     floor(num_grow mix / (mix + 1)) by |grad|, then the rest at random

    Counts are exact even with ties, which keep or grow the earlier entry in row order. NaN counts
    as infinite: a NaN weight is not dropped, and an entry with a NaN gradient grows.

    Nothing is sorted, see `magnitude_mask`.

    Args:
      mask: bool[...], True = kept, one layer.
      weight: floating[...], shape of the mask; read where the mask keeps.
      grad: floating[...], shape of the mask, gradient of the dense weight; not read by "random".
      num_drop: integer[], entries to drop, clamped to what the mask keeps; a traced value does not
        recompile.
      num_grow: integer[], entries to grow, clamped to what is not kept; likewise.
      growth: "gradient" (RigL), "random" (SET) or "mixed" (MST).
      mix: entries grown by gradient for each grown at random, of "mixed" only.
      key: PRNG key of "random" and "mixed".

    Returns:
      bool, shape of the mask, with `|mask| - num_drop + num_grow` entries kept.

    Raises:
      ValueError: if the mask is not boolean, `weight` or `grad` is not floating or not shaped like
        it, a count is not an integer scalar, `growth` is unknown, `mix` is not positive, or `grad`
        or `key` is missing where `growth` needs it.

    References:
      Mocanu et al., SET, arXiv:1707.04780; Evci et al., RigL, arXiv:1911.11134; Hu, Li, Huang, MST,
      arXiv:2408.11746, whose released code draws differently on every device; here one key decides.

    Example:
      >>> mask, weight = jnp.array([True, True, False, False]), jnp.array([3.0, -1, 0, 0])
      >>> grad = jnp.array([0.0, 1, -2, 0])
      >>> drop_and_grow(mask, weight=weight, grad=grad, num_drop=1, num_grow=2).astype(int)
      Array([1, 1, 1, 0], dtype=int32)
    """
    if growth not in ("gradient", "random", "mixed"):
        known = "'gradient', 'random' or 'mixed'"
        raise ValueError(f"growth must be {known}, got growth={growth!r}")
    if not isinstance(mix, int) or mix < 1:
        raise ValueError(f"mix must be an int of at least 1, got mix={mix!r}")
    _check_mask("mask", mask, mask.shape)
    _check_floating("weight", weight, mask.shape)
    if growth != "random":
        _check_floating("grad", grad, mask.shape)
    if growth != "gradient" and key is None:
        raise ValueError(f"key must be given for growth={growth!r}, got key=None")

    (num_before,) = count_true(mask)
    num_kept = num_before - jnp.clip(check_count("num_drop", num_drop), 0, num_before)
    num_grow = jnp.clip(check_count("num_grow", num_grow), 0, mask.size - num_kept)
    # num_grow - floor(num_grow mix / (mix + 1)), without a product that could overflow.
    num_random = {"gradient": 0, "random": num_grow, "mixed": -(-num_grow // (mix + 1))}[growth]

    mask = magnitude_mask(weight, num_kept, among=mask)
    if growth != "random":
        mask |= magnitude_mask(grad, num_grow - num_random, among=~mask)
    if growth != "gradient":
        mask |= random_mask(key, mask.shape, num_random, among=~mask)
    return mask


def apply_topology(weight: PyTree, old_mask: PyTree, new_mask: PyTree) -> PyTree:
    """Return the weights under a new mask: those that both masks keep, and zeros.

    w' = w where old_mask and new_mask, else 0

    Grown weights start at 0. A weight dropped and grown in the same update is in both masks and
    keeps its value.

    Args:
      weight: floating[...], or a pytree of them.
      old_mask: bool[...], True = kept, shape of the weight; or a pytree like `weight`, with None
        for a leaf that is never sparse.
      new_mask: like `old_mask`.

    Returns:
      Like `weight`; unchanged where the mask is None.

    Raises:
      ValueError: if a mask is not boolean or not shaped like its weight, or the trees differ.

    References:
      Evci et al., RigL, arXiv:1911.11134; Hu, Li, Huang, MST, arXiv:2408.11746, as released.

    Example:
      >>> old, new = jnp.array([True, True, False]), jnp.array([True, False, True])
      >>> apply_topology(jnp.array([1.0, 2, 3]), old, new)
      Array([1., 0., 0.], dtype=float32)
    """
    return _map_masks(lambda w, old, new: jnp.where(old & new, w, 0), weight, old_mask, new_mask)


def reset_moments(
    moments: PyTree,
    old_mask: PyTree,
    new_mask: PyTree,
    *,
    rule: Literal["stale", "zero", "mean"] = "zero",
) -> PyTree:
    """Return an optimizer's moments after an update of the masks.

    zero:  m' = 0 where new_mask and not old_mask, else m
    mean:  m' = mean of m over old_mask where new_mask and not old_mask, else m; 0 if old_mask keeps
           nothing
    stale: m' = m

    "zero" is RigL's rule: a grown weight starts without momentum. "stale" is that of MST's released
    code. A weight dropped and grown in the same update keeps its moments under every rule.

    "mean" is ours, for second moments. If Adam's second moment is 0, or decayed while the weight
    was pruned, the first steps of a grown weight are as long as the learning rate, whatever its
    gradients. With the mean of the layer its steps are as long as those of other weights.

    Args:
      moments: floating[..., K, N], or a pytree of them: one moment of every weight.
      old_mask: bool[...], True = kept, shape of the moment; or a pytree like `moments`, with None
        for a leaf that is never sparse.
      new_mask: like `old_mask`.
      rule: "zero", "mean" (over the last two axes) or "stale".

    Returns:
      Like `moments`.

    Raises:
      ValueError: if the rule is unknown, a mask is not boolean or not shaped like its moment, or
        the trees differ.

    References:
      As `apply_topology`.

    Example:
      >>> old, new = jnp.array([True, True, False]), jnp.array([True, False, True])
      >>> reset_moments(jnp.array([1.0, 2, 3]), old, new)
      Array([1., 2., 0.], dtype=float32)
    """
    if rule not in ("stale", "zero", "mean"):
        raise ValueError(f"rule must be 'stale', 'zero' or 'mean', got rule={rule!r}")

    def reset(moment, old, new):
        if rule == "stale":
            return moment
        first = jnp.zeros((), moment.dtype)
        if rule == "mean":
            count = jnp.maximum(old.sum((-2, -1), keepdims=True), 1).astype(moment.dtype)
            first = jnp.where(old, moment, 0).sum((-2, -1), keepdims=True) / count
        return jnp.where(new & ~old, first, moment)

    return _map_masks(reset, moments, old_mask, new_mask)


def block_scores(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Return the score of every block for dropping and growing, its sum of magnitudes.

    score_ij = sum of |x| over block (i, j)

    Args:
      x: floating[..., K, N], weights or gradients; leading axes are layers.
      block: (rows, columns) of a block; they divide K and N.

    Returns:
      f32[..., I, J] (f64 for f64), I = K / rows and J = N / columns.

    Raises:
      ValueError: if x is not floating or has fewer than two axes, or the block is not positive or
        does not divide its axes.

    Numerics:
      Sums in f32 at least, along the columns of a block and then along its rows. A block with a
      NaN scores NaN.

    Example:
      >>> block_scores(jnp.array([[1.0, -2, 0, 0], [3, 0, 0, -1]]), (2, 2))
      Array([[6., 1.]], dtype=float32)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got x.dtype={x.dtype}")
    rows, columns = block
    if x.ndim < 2 or min(block) < 1 or x.shape[-2] % rows or x.shape[-1] % columns:
        raise ValueError(
            f"block must divide the last two axes of x[..., K, N], got {block=} for "
            f"x.shape={x.shape}"
        )
    shape = (*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
    magnitude = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return magnitude.reshape(shape).sum(-1).sum(-2)


def expand_blocks(mask: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Expand a mask of blocks to one entry per weight.

    mask'[r, c] = mask[r // rows, c // columns]

    Args:
      mask: bool[..., I, J], True = kept.
      block: (rows, columns) of a block.

    Returns:
      bool[..., I rows, J columns].

    Raises:
      ValueError: if the mask is not boolean or has fewer than two axes, or the block is not
        positive.

    Example:
      >>> expand_blocks(jnp.array([[True, False]]), (2, 2)).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0]], dtype=int32)
    """
    if mask.dtype != jnp.bool_ or mask.ndim < 2:
        raise ValueError(f"mask must be bool[..., I, J], got {mask.dtype}{list(mask.shape)}")
    if min(block) < 1:
        raise ValueError(f"block must be positive, got {block=}")
    return mask.repeat(block[0], axis=-2).repeat(block[1], axis=-1)


def expand_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the mask with one entry per weight.

    Args:
      mask: bool[..., I, J], True = kept; one entry per weight or per block.
      shape: (..., K, N) of the weight; K and N are multiples of I and J.

    Returns:
      bool[shape].

    Raises:
      ValueError: if the mask does not fit the weight.

    Example:
      >>> expand_mask(jnp.array([[True, False]]), (1, 4)).astype(int)
      Array([[1, 1, 0, 0]], dtype=int32)
    """
    if mask.shape == tuple(shape):
        return mask
    return expand_blocks(mask, block_of(mask, shape))


def block_of(mask: jax.Array, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, columns) of the blocks of a mask, (K / I, N / J).

    Args:
      mask: bool[..., I, J], True = kept.
      shape: (..., K, N) of the weight.

    Raises:
      ValueError: if the mask does not fit the weight.

    Example:
      >>> block_of(jnp.ones((2, 3), bool), (8, 48))
      (4, 16)
    """
    fits = mask.shape[:-2] == tuple(shape[:-2])
    if not fits or shape[-2] % mask.shape[-2] or shape[-1] % mask.shape[-1]:
        raise ValueError(
            f"mask must have one entry for each block of a weight {list(shape)}, got {mask.shape=}"
        )
    return shape[-2] // mask.shape[-2], shape[-1] // mask.shape[-1]


def _map_masks(function, tree: PyTree, old_mask: PyTree, new_mask: PyTree) -> PyTree:
    def apply(old, new, x):
        if old is None and new is None:
            return x
        for name, mask in (("old_mask", old), ("new_mask", new)):
            if mask is None:
                raise ValueError(f"{name} must not be None where the other mask is given")
            _check_mask(name, mask, x.shape)
        return function(x, old, new)

    return jax.tree.map(apply, old_mask, new_mask, tree, is_leaf=lambda leaf: leaf is None)


def _check_mask(name: str, mask: jax.Array, shape: tuple[int, ...]) -> None:
    if mask.dtype != jnp.bool_ or mask.shape != shape:
        raise ValueError(f"{name} must be bool{list(shape)}, got {mask.dtype}{list(mask.shape)}")


def _check_floating(name: str, x: jax.Array | None, shape: tuple[int, ...]) -> None:
    if x is None or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape != shape:
        got = None if x is None else f"{x.dtype}{list(x.shape)}"
        raise ValueError(f"{name} must be floating{list(shape)} like the mask, got {name}={got}")
