"""Draw docs/nm_layout.png: which lane holds which metadata, and the bits of one word."""

import pathlib

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from pallas_kernels.nm_matmul.packing import compress

ROWS, COLUMNS, LANE = 16, 64, 5
PAIRS = ("#c6dbef", "#9ecae1", "#fdd0a2", "#fdae6b")
KEPT = "#333333"


def make_strip():
    """Return values [64, 64] that name their place, and a mask of two of every four."""
    rng = np.random.default_rng(3)
    rank = rng.random((64, 16, 4)).argsort(axis=-1).argsort(axis=-1)
    return jnp.ones((64, 64), jnp.bfloat16), (rank < 2).reshape(64, 64)


def draw_strip(axis, mask):
    for row in range(ROWS):
        for quarter in range(4):
            lane = 4 * (row % 8) + quarter
            chosen = lane == LANE
            axis.add_patch(
                Rectangle(
                    (16 * quarter, row), 16, 1, facecolor=PAIRS[quarter],
                    edgecolor="crimson" if chosen else "white",
                    linewidth=2.5 if chosen else 1, zorder=3 if chosen else 1,
                    alpha=1.0 if row < 8 else 0.8,
                )
            )  # fmt: skip
            axis.text(
                16 * quarter + 8, row + 0.33, f"lane {lane}", ha="center", va="center",
                fontsize=9, zorder=5, color="crimson" if chosen else "black",
                fontweight="bold" if chosen else "normal",
            )  # fmt: skip
            for column in range(16 * quarter, 16 * quarter + 16):
                if mask[row, column]:
                    axis.add_patch(
                        Rectangle((column + 0.15, row + 0.62), 0.7, 0.26, color=KEPT, zorder=4)
                    )
    for column in range(0, COLUMNS, 4):
        axis.axvline(column, color="white", linewidth=1.5, zorder=2)
    axis.axhline(8, color="black", linewidth=1.2, zorder=4)
    axis.axvline(32, color="black", linewidth=1.2, zorder=4)
    axis.set(
        xlim=(0, COLUMNS), ylim=(ROWS, 0), xticks=range(0, COLUMNS + 1, 16),
        yticks=[0.5, 7.5, 8.5, 15.5], yticklabels=[0, 7, 8, 15], ylabel="row of the strip",
    )  # fmt: skip
    axis.set_title(
        "A strip of the sparse operand, 16 rows and 64 columns, with the lane that holds its "
        "metadata. Black entries are kept, two of every four.\nmma.sp multiplies one strip, "
        "wgmma.sp four, one of each warp of a warpgroup.",
        fontsize=11, loc="left",
    )  # fmt: skip
    for start, text in (
        (0, "columns 0 to 31: first instruction (selector 0, lanes 0 and 1 of every four)"),
        (32, "columns 32 to 63: second instruction (selector 1, lanes 2 and 3 of every four)"),
    ):
        axis.text(start + 16, 17.3, text, ha="center", fontsize=10)


def draw_word(axis, mask, word):
    row, quarter = divmod(LANE, 4)
    first = 16 * quarter
    for half in range(2):
        line = row + 8 * half
        for group in range(4):
            at = 16 * half + 4 * group  # lowest bit
            left = 28 - at
            axis.add_patch(Rectangle((left, 0), 4, 1, facecolor=PAIRS[quarter], edgecolor="white"))
            columns = range(first + 4 * group, first + 4 * group + 4)
            kept = [i for i, column in enumerate(columns) if mask[line, column]]
            nibble = (word >> at) & 15
            assert [nibble & 3, nibble >> 2] == kept, "the picture shows what the code packs"
            for bit in range(4):
                value = (word >> (at + bit)) & 1
                axis.text(31.5 - at - bit, 0.5, str(value), ha="center", va="center", fontsize=12)
            # Written as the bits are: the group's last column on the left.
            for i, column in enumerate(columns):
                x = 31.5 - at - i
                axis.add_patch(
                    Rectangle((x - 0.42, 2.3), 0.84, 0.84, edgecolor="grey",
                              facecolor=KEPT if i in kept else "white")
                )  # fmt: skip
                axis.text(x, 3.45, str(column), ha="center", fontsize=8)
            axis.text(
                left + 2, 1.5, f"second: {kept[1]}  first: {kept[0]}", ha="center", fontsize=9
            )
            axis.text(left + 2, -0.45, f"bits {at + 3} to {at}", ha="center", fontsize=9)
        axis.text(24 - 16 * half, 4.1, f"row {line} of the strip, columns {first + 15} to {first}",
                  ha="center", fontsize=10)  # fmt: skip
    axis.axvline(16, color="black", linewidth=1.2, ymin=0.02, ymax=0.98)
    axis.set(xlim=(-0.2, 32.2), ylim=(-0.9, 4.6))
    axis.axis("off")
    axis.set_title(
        f"The word of lane {LANE} (outlined in red above): 0x{word:08X}. Each group of four "
        "columns has four bits, the positions of its two kept values.",
        fontsize=11, loc="left",
    )  # fmt: skip


def main():
    values, mask = make_strip()
    metadata = compress(values, jnp.asarray(mask)).metadata
    word = int(metadata[0, 0, LANE])
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(14, 11), layout="constrained", height_ratios=[7, 3]
    )
    draw_strip(top, mask)
    draw_word(bottom, mask, word)
    figure.savefig(pathlib.Path(__file__).parent / "nm_layout.png", dpi=100)


if __name__ == "__main__":
    main()
