"""The search for the best transposable pattern of each tile of 4 x 4, in Triton.

What is computed, and in which order, stands in `pallas_kernels.transposable_mask.xla`: the two
agree to the bit. A lane holds a tile, the 32 of a warp lie side by side, and nothing is exchanged
between them.

Bits of a pattern stand in row order, the first entry highest: of two patterns the first in row
order is the larger number.
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false


@triton.jit
def _load_row(w, at, is_there, MOST: tl.constexpr):
    """Load a row of each tile, as four arrays of capped magnitudes."""
    columns = tl.arange(0, 4)
    row = tl.load(w + at[:, None] + columns[None, :], mask=is_there[:, None], other=0.0)
    magnitude = tl.abs(row.to(tl.float32))
    # A comparison with NaN is false.
    magnitude = tl.where(magnitude < MOST, magnitude, MOST)
    even, odd = tl.split(tl.reshape(magnitude, [at.shape[0], 2, 2]))
    column_0, column_2 = tl.split(even)
    column_1, column_3 = tl.split(odd)
    return column_0, column_1, column_2, column_3


@triton.jit
def _choose(upper_p, upper_q, lower_p, lower_q, STRAIGHT: tl.constexpr, CROSSED: tl.constexpr):
    """Give one of two columns to the upper part and the other to the lower one."""
    straight = upper_p + lower_q
    crossed = upper_q + lower_p
    is_straight = straight >= crossed
    return tl.where(is_straight, straight, crossed), tl.where(is_straight, STRAIGHT, CROSSED)


@triton.jit
def _choose_all(upper, lower, UPPER: tl.constexpr, LOWER: tl.constexpr):
    """Choose for every two columns, in the order 01, 02, 03, 12, 13, 23.

    Args:
      upper, lower: four arrays each.
      UPPER, LOWER: bits of column 0 in the rows of either part; column j stands j places lower.

    Returns:
      tuple of six sums and tuple of six arrays of bits.
    """
    a0, a1, a2, a3 = upper
    b0, b1, b2, b3 = lower
    v01, k01 = _choose(a0, a1, b0, b1, UPPER | LOWER >> 1, UPPER >> 1 | LOWER)
    v02, k02 = _choose(a0, a2, b0, b2, UPPER | LOWER >> 2, UPPER >> 2 | LOWER)
    v03, k03 = _choose(a0, a3, b0, b3, UPPER | LOWER >> 3, UPPER >> 3 | LOWER)
    v12, k12 = _choose(a1, a2, b1, b2, UPPER >> 1 | LOWER >> 2, UPPER >> 2 | LOWER >> 1)
    v13, k13 = _choose(a1, a3, b1, b3, UPPER >> 1 | LOWER >> 3, UPPER >> 3 | LOWER >> 1)
    v23, k23 = _choose(a2, a3, b2, b3, UPPER >> 2 | LOWER >> 3, UPPER >> 3 | LOWER >> 2)
    return (v01, v02, v03, v12, v13, v23), (k01, k02, k03, k12, k13, k23)


@triton.jit
def _take_larger(total, bits, other_total, other_bits):
    """Take the larger sum, of equal ones that whose pattern comes first in row order."""
    is_other = (other_total > total) | ((other_total == total) & (other_bits > bits))
    return tl.where(is_other, other_total, total), tl.where(is_other, other_bits, bits)


@triton.jit
def _split(totals, bits):
    """Take the better way to divide the columns into two pairs that choose: 01|23 or 02|13."""
    return _take_larger(
        totals[0] + totals[5], bits[0] | bits[5], totals[1] + totals[4], bits[1] | bits[4]
    )


@triton.jit
def _store_row(words, at, bits, is_there):
    """Store four bits as four bytes, the highest bit first."""
    spread = (bits & 15) * ((1 << 27) | (1 << 18) | (1 << 9) | 1)
    tl.store(words + at, (spread >> 3) & 0x01010101, mask=is_there)


@triton.jit
def transposable_mask(
    w, out, N: tl.constexpr, TILES: tl.constexpr, TILES_OF_PROGRAM: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Write the masks of consecutive tiles.

    Args:
      w: pointer to float[K, N].
      out: to bool[K, N], written.
      N: columns.
      TILES: of 4 x 4, in all.
      TILES_OF_PROGRAM: a power of two.
      MOST: what a magnitude counts at most, NaN too.
    """
    tile = tl.program_id(0) * TILES_OF_PROGRAM + tl.arange(0, TILES_OF_PROGRAM)
    is_there = tile < TILES
    columns: tl.constexpr = N // 4
    # A stack of large layers has more elements than 32 bits count.
    start = (tile // columns).to(tl.int64) * (4 * N) + (tile % columns) * 4
    a = _load_row(w, start, is_there, MOST)
    b = _load_row(w, start + N, is_there, MOST)
    c = _load_row(w, start + 2 * N, is_there, MOST)
    d = _load_row(w, start + 3 * N, is_there, MOST)
    tops, top_bits = _choose_all(a, b, 0x8000, 0x0800)
    bottoms, bottom_bits = _choose_all(c, d, 0x0080, 0x0008)
    ab = a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]
    cd = c[0] + d[0], c[1] + d[1], c[2] + d[2], c[3] + d[3]
    halves, half_bits = _choose_all(ab, cd, 0x8800, 0x0088)
    total, bits = _split(halves, half_bits)
    top, top_split = _split(tops, top_bits)
    bottom, bottom_split = _split(bottoms, bottom_bits)
    total, bits = _take_larger(total, bits, top + bottom, top_split | bottom_split)
    for pair in tl.static_range(6):
        total, bits = _take_larger(
            total,
            bits,
            (tops[pair] + bottoms[pair]) + halves[5 - pair],
            top_bits[pair] | bottom_bits[pair] | half_bits[5 - pair],
        )
    # Four bytes of a row of a tile are stored at once.
    words = out.to(tl.pointer_type(tl.int32))
    word = start // 4
    _store_row(words, word, bits >> 12, is_there)
    _store_row(words, word + columns, bits >> 8, is_there)
    _store_row(words, word + 2 * columns, bits >> 4, is_there)
    _store_row(words, word + 3 * columns, bits, is_there)
