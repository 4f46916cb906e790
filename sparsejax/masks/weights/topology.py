"""Dynamic sparse training: which entries are dropped and grown, and what becomes of their values.

One function drops and grows for all methods: SET grows at random, RigL by the gradient, MST mixes
both; a static mask drops and grows nothing, and gradual magnitude pruning only drops.

A layer is one array: stacked layers are mapped over with `jax.vmap`, each with its own counts and
key. Blocks are entries of a smaller array, with `block_scores` for weights and gradients.

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
    """Drop the smallest weights of a mask, and grow as many entries as asked for.

    kept  = the (|mask| - num_drop) largest |weight| of the mask
    grown = num_grow of what is not kept, just-dropped entries included:
      gradient  the largest |grad|
      random    uniformly at random
      mixed     floor(num_grow mix / (mix + 1)) by |grad|, of the others the rest at random

    Counts are exact whatever ties there are; of equal magnitudes the earlier in row order is kept
    or grown. NaN counts as infinite: such a weight is not dropped, such a gradient grows.

    Thresholds are found by bisection on the bits of magnitudes and not by sorting, see
    `magnitude_mask`.

    Args:
      mask: bool[...], True = kept, one layer.
      weight: floating[...], shape of the mask; read where the mask keeps.
      grad: floating[...], shape of the mask, gradient of the dense weight; not read by "random".
      num_drop: integer[], entries to drop; a traced value does not recompile. Clamped to what the
        mask holds.
      num_grow: integer[], entries to grow, likewise. Clamped to what is not kept.
      growth: "gradient" (RigL), "random" (SET) or "mixed" (MST).
      mix: int, entries grown by gradient for each grown at random, of "mixed" only.
      key: PRNG key of "random" and "mixed".

    Returns:
      bool, shape of the mask, with |mask| - num_drop + num_grow entries kept.

    Raises:
      ValueError: if the mask is not boolean, `weight` or `grad` is not floating or not shaped like
        it, a count is not an integer scalar, `growth` is unknown, `mix` is not positive, or `grad`
        or `key` is missing where `growth` needs it.

    References:
      Mocanu et al., SET, arXiv:1707.04780; Evci et al., RigL, arXiv:1911.11134; Hu, Li, Huang, MST,
      arXiv:2408.11746, whose released code draws on every device anew; here one key decides.

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
    """Return the weights of a new mask: those kept all along, and zeros.

    w' = w where old_mask and new_mask, else 0

    New weights start at 0. One that was dropped and grown in the same update is in both masks and
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
    """Return an optimizer's moments after an update of the topology.

    zero:  m' = 0 where new_mask and not old_mask, else m
    mean:  m' = mean of m over old_mask, likewise; 0 if that keeps nothing
    stale: m' = m

    As RigL has it, a grown weight does not inherit the momentum of its former life. MST's released
    code leaves Adam's moments as they are. A weight dropped and grown in the same update keeps its
    moments under every rule.

    The mean is ours, for second moments. Where Adam's is 0, or has decayed while the weight was
    pruned, the first steps of all grown weights are as long as the learning rate, whatever their
    gradients. With the mean of the layer they are as long as those of others.

    Args:
      moments: floating[..., K, N], or a pytree of them: one moment of every weight.
      old_mask: bool[...], True = kept, shape of the moment; or a pytree like `moments`, with None
        for a leaf that is never sparse.
      new_mask: like `old_mask`.
      rule: "zero", "mean" or "stale". A mean is over the last two axes.

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
    """Return the magnitude of every block, by which blocks are dropped and grown.

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
    """Return the mask of weights that a mask of blocks stands for.

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
    """Return the mask of every weight, whether this one has an entry for each or for each block.

    Args:
      mask: bool[..., I, J], True = kept.
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
    """Return (rows, columns) of the blocks that a mask has an entry for.

    Args:
      mask: bool[..., I, J].
      shape: (..., K, N) of the weight.

    Returns:
      tuple of two ints, K / I and N / J.

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
