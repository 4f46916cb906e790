"""Draw docs/nm_fragments.png: what a lane holds of the operands of `mma.sp`, m16n8k32.

`tests/kernels/test_nm_fragments.py` compares the places with those of the machine that runs PTX.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

LANE = 5
QUARTERS = ("#c6dbef", "#9ecae1", "#fdd0a2", "#fdae6b")
LINES = 16  # of cells, in each of the pictures


def hold_values():
    """Return lane and number of each kept value of A, int[16, 16]: a lane has a0 to a7."""
    row, column = np.indices((16, 16))
    return 4 * (row % 8) + column % 8 // 2, 4 * (column // 8) + 2 * (row // 8) + column % 2


def hold_dense():
    """Return lane and number of each element of B, int[32, 8]: a lane has b0 to b7."""
    row, column = np.indices((32, 8))
    return 4 * column + row % 8 // 2, 2 * (row // 8) + row % 2


def hold_sums():
    """Return lane and number of each sum, int[16, 8]: a lane has c0 to c3."""
    row, column = np.indices((16, 8))
    return 4 * (row % 8) + column // 2, 2 * (row // 8) + column % 2


def hold_metadata(selector):
    """Return lane and lowest bit of the four bits of each group of A, int[16, 8].

    Args:
      selector: 0 or 1, of the instruction.
    """
    row, group = np.indices((16, 8))
    return 4 * (row % 8) + 2 * selector + group // 4, 16 * (row // 8) + 4 * (group % 4)


def draw_cell(axis, left, top, width, lane, text):
    chosen = lane == LANE
    axis.add_patch(
        Rectangle(
            (left, top), width, 1, facecolor=QUARTERS[lane % 4],
            edgecolor="crimson" if chosen else "white",
            linewidth=2.5 if chosen else 1, zorder=3 if chosen else 1,
        )
    )  # fmt: skip
    axis.text(
        left + width / 2, top + 0.53, text, ha="center", va="center", fontsize=9, zorder=5,
        color="crimson" if chosen else "black", fontweight="bold" if chosen else "normal",
    )  # fmt: skip


def draw_pairs(axis, name, lanes, numbers):
    """Draw pairs of neighbours along the last axis, each of which is one register or two.

    Args:
      name: letter of the elements.
      lanes, numbers: int[16, 2 * pairs].
    """
    assert (lanes[:, ::2] == lanes[:, 1::2]).all()
    assert (numbers[:, ::2] + 1 == numbers[:, 1::2]).all()
    for line, column in np.ndindex(LINES, lanes.shape[1] // 2):
        lane, number = lanes[line, 2 * column], numbers[line, 2 * column]
        draw_cell(axis, column, line, 1, lane, f"{lane}: {name}{number} {name}{number + 1}")
    axis.set(xlim=(0, lanes.shape[1] // 2), ylim=(LINES, 0))


def draw_rows(axis):
    axis.axhline(8, color="black", linewidth=1.2, zorder=4)
    axis.set(yticks=np.arange(LINES) + 0.5, yticklabels=range(LINES))
    axis.set_ylabel("row")


def draw_metadata(axis, selector):
    lanes, bits = hold_metadata(selector)
    for row, part in np.ndindex(LINES, 2):
        groups = slice(4 * part, 4 * part + 4)
        (lane,) = set(lanes[row, groups].tolist())
        first = bits[row, groups].min()
        draw_cell(axis, 16 * part, row, 16, lane, f"{lane}: bits {first} to {first + 15}")
    draw_rows(axis)
    axis.set(xlim=(0, 32), ylim=(LINES, 0), xticks=range(0, 33, 4))
    axis.set_xlabel("column of A; each four have four bits")
    axis.set_title(
        f"Metadata of A with selector {selector}:\n"
        f"lanes {2 * selector} and {2 * selector + 1} of every four", fontsize=11, loc="left",
    )  # fmt: skip


def draw_values(axis):
    draw_pairs(axis, "a", *hold_values())
    draw_rows(axis)
    axis.axvline(4, color="black", linewidth=1.2, zorder=4)
    axis.set(
        xticks=np.arange(8) + 0.5, xticklabels=[f"{4 * i} to {4 * i + 3}" for i in range(8)],
        xlabel="columns of A; a register holds the two kept values of each four",
    )  # fmt: skip
    axis.set_title("A, 16 x 32, of which 16 x 16 values are kept", fontsize=11, loc="left")


def draw_dense(axis):
    lanes, numbers = hold_dense()
    # Neighbours are one below the other.
    for line, column in np.ndindex(LINES, 8):
        lane, number = lanes[2 * line, column], numbers[2 * line, column]
        assert lane == lanes[2 * line + 1, column] and number + 1 == numbers[2 * line + 1, column]
        draw_cell(axis, column, line, 1, lane, f"{lane}: b{number} b{number + 1}")
    for line in (4, 8, 12):
        axis.axhline(line, color="black", linewidth=1.2, zorder=4)
    axis.set(
        xlim=(0, 8), ylim=(LINES, 0), xticks=np.arange(8) + 0.5, xticklabels=range(8),
        yticks=np.arange(LINES) + 0.5, ylabel="rows", xlabel="column",
        yticklabels=[f"{2 * i}, {2 * i + 1}" for i in range(LINES)],
    )  # fmt: skip
    axis.set_title("B, 32 x 8: two rows to a line", fontsize=11, loc="left")


def draw_sums(axis):
    draw_pairs(axis, "c", *hold_sums())
    draw_rows(axis)
    axis.set(
        xticks=np.arange(4) + 0.5, xticklabels=[f"{2 * i}, {2 * i + 1}" for i in range(4)],
        xlabel="columns",
    )  # fmt: skip
    axis.set_title("Sums, 16 x 8: float32", fontsize=11, loc="left")


def main():
    figure = plt.figure(figsize=(14, 11.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    parts = figure.subplot_mosaic(
        [["first", "second", "dense"], ["values", "values", "sums"]], width_ratios=[1, 1, 2]
    )
    draw_metadata(parts["first"], 0)
    draw_metadata(parts["second"], 1)
    draw_dense(parts["dense"])
    draw_values(parts["values"])
    draw_sums(parts["sums"])
    figure.suptitle(
        "What the 32 lanes of a warp hold for one mma.sp, m16n8k32. \"5: a0 a1\" is lane 5 with "
        "two elements: one register of A or B, two of sums.\nLane 5 is outlined; with selector 1 "
        "its metadata are not read. Colours are lanes modulo four.",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(pathlib.Path(__file__).parent / "nm_fragments.png", dpi=100)


if __name__ == "__main__":
    main()
