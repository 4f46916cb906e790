"""How many attention blocks each query block, and each layer, keeps of a budget.

Legend: L layers, N query heads, I query blocks.
"""

from collections.abc import Sequence

import numpy as np


def count_row_blocks(num_blocks: int, *, density: float, causal: bool) -> np.ndarray:
    """Say how many blocks each query block keeps, alike for all that have as many to choose from.

    A causal query block i keeps min(i + 1, c), with the largest c that the density allows; of what
    is left, one each goes to the first query blocks that see more: there it is a larger part. A
    shorter input has the first of the counts.

    Args:
      num_blocks: int, I = J.
      density: float in (0, 1], share of the visible blocks.
      causal: bool, query block i sees i + 1 blocks.

    Returns:
      int[I], whose sum is the share of the visible blocks, rounded.

    Raises:
      ValueError: if that is less than one block for each query block.

    Example:
      >>> count_row_blocks(8, density=0.5, causal=True)
      array([1, 2, 3, 3, 3, 2, 2, 2])
    """
    visible = np.arange(1, num_blocks + 1) if causal else np.full(num_blocks, num_blocks)
    total = round(density * int(visible.sum()))
    if not num_blocks <= total <= visible.sum():
        raise ValueError(
            f"density={density} must keep at least one of {num_blocks} blocks for each query block "
            f"and at most all {visible.sum()}, got {total}"
        )
    most = max(c for c in range(1, num_blocks + 1) if np.minimum(visible, c).sum() <= total)
    counts = np.minimum(visible, most)
    counts[np.flatnonzero(counts < visible)[: total - int(counts.sum())]] += 1
    return counts


def spread_over_layers(
    counts_I: np.ndarray,
    shares_L: Sequence[float],
    *,
    num_heads: int,
    least_I: np.ndarray,
    most_I: np.ndarray,
) -> np.ndarray:
    """Give layers their shares of the blocks of each query block.

    Args:
      counts_I: int[I], blocks of a head, the mean over layers.
      shares_L: of each layer, in any unit.
      num_heads: int, N.
      least_I: int[I], blocks that each head needs.
      most_I: int[I], blocks that each head can keep.

    Returns:
      int[L, I], of all heads together; each query block's sum over layers is L N counts_I, and
      layers have their shares as far as the bounds allow.

    Example:
      >>> least, most = np.array([1, 2, 2]), np.array([1, 2, 3])
      >>> arguments = {"num_heads": 4, "least_I": least, "most_I": most}
      >>> spread_over_layers(np.array([1, 2, 2]), (1.0, 1.0), **arguments).tolist()
      [[4, 8, 8], [4, 8, 8]]
      >>> spread_over_layers(np.array([1, 2, 3]), (1.0, 3.0), **arguments).tolist()
      [[4, 8, 12], [4, 8, 12]]
    """
    shares = np.asarray(shares_L, np.float64)[:, None]
    low_I, high_I = num_heads * least_I, num_heads * most_I
    wanted_I = len(shares) * num_heads * counts_I
    floor, ceiling = np.zeros(len(counts_I)), high_I / shares.min()
    for _ in range(60):
        scale = (floor + ceiling) / 2
        enough = np.clip(scale * shares, low_I, high_I).sum(0) >= wanted_I
        floor, ceiling = np.where(enough, floor, scale), np.where(enough, scale, ceiling)
    exact_LI = np.clip(ceiling * shares, low_I, high_I)
    counts_LI = np.floor(exact_LI + 1e-6).astype(int)
    # Of what rounding has left, one each goes to the largest remainders.
    order_LI = np.argsort(counts_LI - exact_LI, axis=0, kind="stable")
    rest_I = wanted_I - counts_LI.sum(0)
    extra_LI = np.arange(len(shares))[:, None] < rest_I
    np.put_along_axis(counts_LI, order_LI, np.take_along_axis(counts_LI, order_LI, 0) + extra_LI, 0)
    return counts_LI
