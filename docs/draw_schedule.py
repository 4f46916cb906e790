"""Draw docs/block_schedule.png: a pattern, its lists, and the order in which they are started."""

import pathlib

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels import make_block_schedule
from pallas_kernels.block_sparse_attention.block_schedule import drop_blocks_above_diagonal
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import (
    BITS,
    make_grain,
    make_key_lists,
    make_query_lists,
)

NUM_BLOCKS = 12


def main():
    mask = np.tri(NUM_BLOCKS, dtype=bool) & ~np.tri(NUM_BLOCKS, k=-3, dtype=bool)
    mask |= np.tril(np.isin(np.arange(NUM_BLOCKS), (0, 5))[None, :])
    mask[9] = np.arange(NUM_BLOCKS) <= 9
    schedule = make_block_schedule(jnp.asarray(mask)[None, None])
    schedule = drop_blocks_above_diagonal(schedule, block_q=64, block_kv=64)
    options = {"causal": True, "all_masked": False}
    grain = make_grain(64, 64)
    rows = make_query_lists(schedule, grain, **options)
    columns = make_key_lists(schedule, grain, **options, group=1)

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    picture = np.where(mask, 1.0, 0.0) + np.where(np.eye(NUM_BLOCKS, dtype=bool), 1.0, 0.0)
    axes[0].imshow(picture, cmap=matplotlib.colors.ListedColormap(["white", "#9ecae1", "#fd8d3c"]))
    axes[0].set(
        title="pattern: kept blocks, those on the diagonal need a mask",
        xlabel="key block", ylabel="query block",
    )  # fmt: skip
    for axis, lists, first_is_masked, title, label in (
        (axes[1], rows, False, "forward and dQ: a list for each query block", "query block"),
        (axes[2], columns, True, "dK and dV: a list for each key block", "key block"),
    ):
        order = lists.order.tolist()
        for place, unit in enumerate(order):
            leading = int(lists.num_leading[unit])
            for position in range(int(lists.counts[unit])):
                masked = (position < leading) == first_is_masked
                axis.barh(place, 1, left=position, color="#fd8d3c" if masked else "#9ecae1",
                          edgecolor="white")  # fmt: skip
                block = int(lists.entries[unit, position]) // BITS
                axis.text(position + 0.5, place, str(block), ha="center", va="center", fontsize=8)
        axis.set(
            title=title, xlabel="position on the list", ylabel=f"{label}, in the order of starting",
            yticks=range(NUM_BLOCKS), yticklabels=order, xlim=(0, NUM_BLOCKS),
        )  # fmt: skip
        axis.invert_yaxis()
    figure.savefig(pathlib.Path(__file__).parent / "block_schedule.png", dpi=110)


if __name__ == "__main__":
    main()
