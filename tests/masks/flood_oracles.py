"""The rules of flood filling told plainly, one layer at a time."""

import numpy as np


def walk_oracle(padded, threshold, row, column, kept):
    size = len(kept)
    if row >= size or column >= size:
        return
    down, right = padded[row + 1, column], padded[row, column + 1]
    diagonal = padded[row + 1, column + 1]
    if down > right:
        step = (1, 0) if down > diagonal else (1, 1)
    else:
        step = (0, 1) if right > diagonal else (1, 1)
    row, column = row + step[0], column + step[1]
    if row < size and column < size and padded[row, column] > threshold:
        kept[row, column] = True
    walk_oracle(padded, threshold, row, column, kept)


def flood_fill_oracle(pooled, *, quantile, causal=False):
    size = len(pooled)
    starts = [(0, c) for c in range(size)] + [(r, 0) for r in range(size)]
    values = pooled
    if causal:
        starts = [(c, c) for c in range(size)] + [(r, 0) for r in range(size)]
        values = pooled[np.tril_indices(size)]
        pooled = np.tril(pooled)
    threshold = np.quantile(values.astype(np.float64), quantile)
    kept = np.zeros((size, size), bool)
    for row, column in starts:
        walk_oracle(np.pad(pooled, (0, 1)), threshold, row, column, kept)
    return kept | np.eye(size, dtype=bool)


def flood_oracle(pooled, *, threshold, causal):
    """Spread from block to block, as water does; starts spread whether they are kept or not."""
    size = len(pooled)
    visible = np.tril(np.ones((size, size), bool)) if causal else np.ones((size, size), bool)
    starts = [(i, i) if causal else (0, i) for i in range(size)] + [(i, 0) for i in range(size)]
    kept = np.zeros((size, size), bool)
    wet = list(starts)
    for start in starts:
        kept[start] = pooled[start] > threshold
    while wet:
        row, column = wet.pop()
        for i, j in ((row + 1, column), (row, column + 1), (row + 1, column + 1)):
            if max(i, j) < size and visible[i, j] and not kept[i, j] and pooled[i, j] > threshold:
                kept[i, j] = True
                wet.append((i, j))
    return kept | np.eye(size, dtype=bool)
