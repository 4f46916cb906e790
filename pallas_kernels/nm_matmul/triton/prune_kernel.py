"""Pruning in Triton: `nm_matmul.mvue.prune_group`, one operation for one.

Each is rounded by itself and division is to nearest, so the kernel is launched with `fuses=False`.

Letters: R  rows of groups   C  entries behind the axis of the groups
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false

_FLOOR = tl.constexpr(2.0**-23)
_NEGLIGIBLE = tl.constexpr(1e-30)
_STEP = tl.constexpr(2.0**-24)


@triton.jit
def _share(a, total):
    # Written so that NaN takes the second branch and is not lost.
    return tl.where(total < _NEGLIGIBLE, 0.25, tl.div_rn(a, total) + _FLOOR)


@triton.jit
def _approximate(x0, x1, x2, x3, uniform):
    """Draw two without replacement; see `nm_matmul.mvue`."""
    total = (tl.abs(x0) + tl.abs(x1)) + (tl.abs(x2) + tl.abs(x3))
    t0, t1 = _share(tl.abs(x0), total), _share(tl.abs(x1), total)
    t2, t3 = _share(tl.abs(x2), total), _share(tl.abs(x3), total)
    one = tl.full(total.shape, 1.0, tl.float32)
    odds0, odds1 = tl.div_rn(one, t1 + t2 + t3), tl.div_rn(one, t0 + t2 + t3)
    odds2, odds3 = tl.div_rn(one, t0 + t1 + t3), tl.div_rn(one, t0 + t1 + t2)
    p01, p02, p03 = (
        t0 * t1 * (odds0 + odds1), t0 * t2 * (odds0 + odds2), t0 * t3 * (odds0 + odds3)
    )  # fmt: skip
    p12, p13, p23 = (
        t1 * t2 * (odds1 + odds2), t1 * t3 * (odds1 + odds3), t2 * t3 * (odds2 + odds3)
    )  # fmt: skip
    c2 = p01 + p02
    c3 = c2 + p03
    c4 = c3 + p12
    c5 = c4 + p13
    g1, g2, g3 = uniform >= p01, uniform >= c2, uniform >= c3
    g4, g5 = uniform >= c4, uniform >= c5
    return (
        tl.div_rn(x0, p01 + p02 + p03), tl.div_rn(x1, p01 + p12 + p13),
        tl.div_rn(x2, p02 + p12 + p23), tl.div_rn(x3, p03 + p13 + p23),
        ~g3, ~g1 | (g3 & ~g5), (g1 & ~g2) | (g3 & ~g4) | g5, (g2 & ~g3) | g4,
    )  # fmt: skip


@triton.jit
def _magnitude(x):
    # NaN counts as the largest.
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def _by_rank(rank, lowest, low, high, highest):
    return tl.where(rank < 2, tl.where(rank == 0, lowest, low), tl.where(rank == 2, high, highest))


@triton.jit
def _signed(x, magnitude):
    # Zero keeps its sign, and NaN stays.
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)) * magnitude


@triton.jit
def _exact(x0, x1, x2, x3, uniform):
    """Draw with the least variance; see `nm_matmul.mvue`."""
    b0, b1, b2, b3 = _magnitude(x0), _magnitude(x1), _magnitude(x2), _magnitude(x3)
    low01, high01 = tl.minimum(b0, b1), tl.maximum(b0, b1)
    low23, high23 = tl.minimum(b2, b3), tl.maximum(b2, b3)
    a1, x = tl.minimum(low01, low23), tl.maximum(low01, low23)
    y, a4 = tl.minimum(high01, high23), tl.maximum(high01, high23)
    a2, a3 = tl.minimum(x, y), tl.maximum(x, y)
    # How many others are smaller; of equal ones the earlier counts as smaller.
    rank0 = (b1 < b0).to(tl.int32) + (b2 < b0).to(tl.int32) + (b3 < b0).to(tl.int32)
    rank1 = (b0 <= b1).to(tl.int32) + (b2 < b1).to(tl.int32) + (b3 < b1).to(tl.int32)
    rank2 = (b0 <= b2).to(tl.int32) + (b1 <= b2).to(tl.int32) + (b3 < b2).to(tl.int32)
    rank3 = (b0 <= b3).to(tl.int32) + (b1 <= b3).to(tl.int32) + (b2 <= b3).to(tl.int32)

    rest = a1 + a2 + a3
    total = rest + a4
    dominated = a4 >= rest
    spread = 2 * a1 + a3 - a4 > 0
    half = (a3 - a4) * 0.5
    w13 = tl.where(dominated, 0.0, tl.where(spread, a1 + half, 0.0))
    w14 = tl.where(dominated, a1, tl.where(spread, a1 - half, 2 * a1))
    w23 = tl.where(dominated, 0.0, tl.where(spread, a2 + half, rest - a4))
    w24 = tl.where(dominated, a2, tl.where(spread, a2 - half, (a2 - a1) + (a4 - a3)))
    drawn = uniform * tl.where(dominated, rest, total)
    c2 = w13 + w14
    c3 = c2 + w23
    c4 = c3 + w24
    g1, g2, g3, g4 = drawn >= w13, drawn >= c2, drawn >= c3, drawn >= c4
    lowest, low, high, highest = ~g2, g2 & ~g4, ~g1 | (g2 & ~g3) | g4, (g1 & ~g2) | g3

    largest = tl.where(dominated, a4, total * 0.5)
    others = tl.where(dominated, rest, total * 0.5)
    return (
        _signed(x0, tl.where(rank0 == 3, largest, others)),
        _signed(x1, tl.where(rank1 == 3, largest, others)),
        _signed(x2, tl.where(rank2 == 3, largest, others)),
        _signed(x3, tl.where(rank3 == 3, largest, others)),
        _by_rank(rank0, lowest, low, high, highest), _by_rank(rank1, lowest, low, high, highest),
        _by_rank(rank2, lowest, low, high, highest), _by_rank(rank3, lowest, low, high, highest),
    )  # fmt: skip


@triton.jit
def draw_two(x0, x1, x2, x3, random, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Draw two members of each group, and divide them by the probability that they were kept.

    Args:
      x0, x1, x2, x3: f32, the members.
      random: uint32, one number for each group.
      dtype: that results are rounded to.
      EXACT: whether the variance is the least possible.

    Returns:
      tuple of the four members, 0 where they are not kept, and of four bool: whether they are.
    """
    # Multiples of 2^-24 in [0, 1).
    uniform = (random >> 8).to(tl.float32) * _STEP
    if EXACT:
        v0, v1, v2, v3, k0, k1, k2, k3 = _exact(x0, x1, x2, x3, uniform)
    else:
        v0, v1, v2, v3, k0, k1, k2, k3 = _approximate(x0, x1, x2, x3, uniform)
    return (
        tl.where(k0, v0, 0.0).to(dtype), tl.where(k1, v1, 0.0).to(dtype),
        tl.where(k2, v2, 0.0).to(dtype), tl.where(k3, v3, 0.0).to(dtype), k0, k1, k2, k3,
    )  # fmt: skip


@triton.jit
def _split_members(x):
    """Split [4 G] into the four members of each group, [G] each."""
    even, odd = tl.split(x.reshape([x.shape[0] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join_members(x0, x1, x2, x3):
    """Undo `_split_members`."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([4 * x0.shape[0]])


@triton.jit
def prune_mvue(
    x, bits, pruned, kept, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Prune one tile of groups.

    Args:
      x: pointer to float[R, 4, C].
      bits: to uint32[R, C], random.
      pruned: to float[R, 4, C], written.
      kept: to bool[R, 4, C], written.
    """
    across: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first_row = (program // across).to(tl.int64) * ROWS
    first_column = program % across * COLUMNS
    if C == 1:
        # Groups lie in one piece.
        group, entry = tl.arange(0, ROWS), tl.arange(0, 4 * ROWS)
        group_is_there = group < R - first_row
        entry_is_there = entry < 4 * (R - first_row)
        at = first_row * 4 + entry
        x0, x1, x2, x3 = _split_members(tl.load(x + at, mask=entry_is_there, other=0.0))
        random = tl.load(bits + first_row + group, mask=group_is_there, other=0)
    else:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        is_there = (row < R - first_row) & (column < C - first_column)
        at = first_row * 4 * C + first_column + (row * 4 * C + column)
        x0 = tl.load(x + at, mask=is_there, other=0.0)
        x1 = tl.load(x + C + at, mask=is_there, other=0.0)
        x2 = tl.load(x + 2 * C + at, mask=is_there, other=0.0)
        x3 = tl.load(x + 3 * C + at, mask=is_there, other=0.0)
        random_at = first_row * C + first_column + (row * C + column)
        random = tl.load(bits + random_at, mask=is_there, other=0)
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    dtype = pruned.dtype.element_ty
    v0, v1, v2, v3, k0, k1, k2, k3 = draw_two(x0, x1, x2, x3, random, dtype, EXACT)
    if C == 1:
        tl.store(pruned + at, _join_members(v0, v1, v2, v3), mask=entry_is_there)
        kept_values = _join_members(k0.to(tl.int8), k1.to(tl.int8), k2.to(tl.int8), k3.to(tl.int8))
        tl.store(kept + at, kept_values, mask=entry_is_there)
    else:
        tl.store(pruned + at, v0, mask=is_there)
        tl.store(pruned + C + at, v1, mask=is_there)
        tl.store(pruned + 2 * C + at, v2, mask=is_there)
        tl.store(pruned + 3 * C + at, v3, mask=is_there)
        tl.store(kept + at, k0, mask=is_there)
        tl.store(kept + C + at, k1, mask=is_there)
        tl.store(kept + 2 * C + at, k2, mask=is_there)
        tl.store(kept + 3 * C + at, k3, mask=is_there)
