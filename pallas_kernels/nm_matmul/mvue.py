"""Random 2:4 pruning whose mean is what was pruned: minimum-variance unbiased estimators (MVUE).

Of every group of four, two entries are kept and divided by the probability of being kept. One
uniform number draws one of the six pairs. Everything is elementwise on the four members of a
group, so that a compiler fuses it into whatever reads the result.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

GROUP = 4

# Added to each magnitude as a share of the group's sum, so that every member may be drawn.
_FLOOR = 2.0**-23
# Groups that sum to less are drawn evenly; their quotients would leave the normal numbers.
_NEGLIGIBLE = 1e-30


def draw_bits(key: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Draw the random bits of all groups.

    Args:
      key: key[], typed random key.
      shape: of what is pruned.
      axis: int, not negative, in which groups lie.

    Returns:
      uint32, of that shape but for a quarter of the axis.
    """
    shape = (*shape[:axis], shape[axis] // GROUP, *shape[axis + 1 :])
    return jax.random.bits(key, shape, jnp.uint32)


def take_bits(draws: jax.Array, rows: int, columns: int) -> jax.Array:
    """Return the random bits of all groups of four consecutive rows.

    Args:
      draws: key[], typed random key; or uint32[G, columns], bits that were drawn before, of the
        first G groups. Those of groups behind them are zero: they prune rows of zeros.
      rows: int, of what is pruned, a multiple of 4.
      columns: int, of what is pruned.

    Returns:
      uint32[rows / 4, columns].
    """
    if jnp.issubdtype(draws.dtype, jax.dtypes.prng_key):
        return draw_bits(draws, (rows, columns), 0)
    return jnp.pad(draws, ((0, rows // GROUP - draws.shape[0]), (0, 0)))


def prune_drawn(
    x: jax.Array, bits: jax.Array, *, axis: int, exact: bool
) -> tuple[jax.Array, jax.Array]:
    """Prune by random bits that were drawn before.

    Args:
      x: float[..., 4 G, ...].
      bits: uint32[..., G, ...], random.
      axis: int, not negative, in which groups lie.
      exact: bool, see `pallas_kernels.nm_matmul.prune.prune_mvue`.

    Returns:
      tuple of pruned, shaped and typed like x, and mask, bool shaped like x.
    """
    grouped = x.reshape(*bits.shape[: axis + 1], GROUP, *x.shape[axis + 1 :]).astype(jnp.float32)
    members = [jax.lax.index_in_dim(grouped, i, axis + 1, keepdims=False) for i in range(GROUP)]
    values, kept = prune_group(members, as_uniform(bits), exact=exact)
    values = [v.astype(x.dtype) for v in values]
    if not exact:
        # Interleaving ends XLA's fusion on a GPU: without the barrier, the f32 quotients and
        # probabilities cross memory instead of the rounded results.
        values, kept = jax.lax.optimization_barrier((values, kept))
    pruned, mask = (jnp.stack(parts, axis=axis + 1).reshape(x.shape) for parts in (values, kept))
    return pruned, mask


def prune_tokens(dz: jax.Array, draws: jax.Array | None, grad_pruning: str) -> jax.Array:
    """Prune a gradient 2:4 along its tokens as `grad_pruning` says.

    S(dz): groups of four consecutive rows; the last group is filled up with rows of zeros.

    Args:
      dz: float[M, N], gradient of M tokens.
      draws: key[], typed random key, or uint32[ceil(M / 4), N], random bits; None where nothing is
        pruned.
      grad_pruning: "none", "mvue" or "mvue_exact".

    Returns:
      float[M, N], typed like dz.
    """
    if grad_pruning == "none" or draws is None:
        return dz
    rows = dz.shape[0]
    dz = jnp.pad(dz, ((0, -rows % GROUP), (0, 0)))
    bits = take_bits(draws, *dz.shape)
    return prune_drawn(dz, bits, axis=0, exact=grad_pruning == "mvue_exact")[0][:rows]


def as_uniform(bits: jax.Array) -> jax.Array:
    """Make uniform numbers of random bits.

    Args:
      bits: uint32[...].

    Returns:
      f32[...], multiples of 2^-24 in [0, 1).
    """
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def prune_group(
    members: Sequence[jax.Array], uniform: jax.Array, *, exact: bool
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Prune groups given as four arrays, one per member; the arithmetic of `prune_drawn`.

    Args:
      members: four f32[...], the members of each group.
      uniform: f32[...], uniform in [0, 1), one number per group.
      exact: bool, see `prune_drawn`.

    Returns:
      tuple of four f32[...], pruned members, and four bool[...], which of them were kept.
    """
    values, kept = (_exact if exact else _approximate)(members, uniform)
    return [jnp.where(k, v, 0.0) for k, v in zip(kept, values, strict=True)], kept


def _not(flag):
    # Kernels for GPUs have no negation of bool.
    return flag ^ True


def _approximate(members, uniform):
    a = [jnp.abs(x) for x in members]
    total = (a[0] + a[1]) + (a[2] + a[3])
    # Written so that NaN takes the second branch and is not lost.
    t = [jnp.where(total < _NEGLIGIBLE, 1 / GROUP, x / total + _FLOOR) for x in a]
    # 1 - t_i as a sum: where one member dominates, the difference has no digits left.
    others = [t[1] + t[2] + t[3], t[0] + t[2] + t[3], t[0] + t[1] + t[3], t[0] + t[1] + t[2]]
    odds = [1 / x for x in others]
    p01, p02, p03, p12, p13, p23 = (
        t[i] * t[j] * (odds[i] + odds[j])
        for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    )
    inclusion = (p01 + p02 + p03, p01 + p12 + p13, p02 + p12 + p23, p03 + p13 + p23)
    c1 = p01
    c2 = c1 + p02
    c3 = c2 + p03
    c4 = c3 + p12
    c5 = c4 + p13
    g1, g2, g3, g4, g5 = (uniform >= c for c in (c1, c2, c3, c4, c5))
    kept = [
        _not(g3),
        _not(g1) | (g3 & _not(g5)),
        (g1 & _not(g2)) | (g3 & _not(g4)) | g5,
        (g2 & _not(g3)) | g4,
    ]
    return [x / p for x, p in zip(members, inclusion, strict=True)], kept


def _exact(members, uniform):
    # NaN counts as the largest, so that ranks stay a permutation and it is kept.
    a = [jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)) for x in members]
    # Sorted magnitudes by a network of five comparisons, and the rank of each member.
    low01, high01 = jnp.minimum(a[0], a[1]), jnp.maximum(a[0], a[1])
    low23, high23 = jnp.minimum(a[2], a[3]), jnp.maximum(a[2], a[3])
    a1, x = jnp.minimum(low01, low23), jnp.maximum(low01, low23)
    y, a4 = jnp.minimum(high01, high23), jnp.maximum(high01, high23)
    a2, a3 = jnp.minimum(x, y), jnp.maximum(x, y)
    rank = [
        sum((a[j] < a[i] if j > i else a[j] <= a[i]).astype(jnp.int32) for j in range(4) if j != i)
        for i in range(4)
    ]

    rest = a1 + a2 + a3
    total = rest + a4
    dominated = a4 >= rest
    spread = 2 * a1 + a3 - a4 > 0
    # Weights of the pairs (1, 3), (1, 4), (2, 3), (2, 4); (3, 4) takes what is left of the whole.
    w13 = jnp.where(spread, a1 + (a3 - a4) / 2, 0.0)
    w14 = jnp.where(spread, a1 - (a3 - a4) / 2, 2 * a1)
    w23 = jnp.where(spread, a2 + (a3 - a4) / 2, rest - a4)
    w24 = jnp.where(spread, a2 - (a3 - a4) / 2, (a2 - a1) + (a4 - a3))
    w13, w23 = (jnp.where(dominated, 0.0, w) for w in (w13, w23))
    w14, w24 = jnp.where(dominated, a1, w14), jnp.where(dominated, a2, w24)
    drawn = uniform * jnp.where(dominated, rest, total)

    c1 = w13
    c2 = c1 + w14
    c3 = c2 + w23
    c4 = c3 + w24
    g1, g2, g3, g4 = (drawn >= c for c in (c1, c2, c3, c4))
    by_rank = (
        _not(g2),
        g2 & _not(g4),
        _not(g1) | (g2 & _not(g3)) | g4,
        (g1 & _not(g2)) | g3,
    )
    kept = [
        jnp.where(r < 2, jnp.where(r == 0, by_rank[0], by_rank[1]), jnp.where(r == 2, *by_rank[2:]))
        for r in rank
    ]
    values = [
        jnp.sign(x) * jnp.where(dominated, jnp.where(r == 3, a4, rest), total / 2)
        for x, r in zip(members, rank, strict=True)
    ]
    return values, kept
