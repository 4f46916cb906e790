"""Packing in Triton: one kernel reads a weight and its mask once, and packs one or both axes.

A program has one tile of 64 x 64, so that along either axis it writes whole words of metadata. To
pack along K it turns the tile, which goes through shared memory. Which two members of a group are
kept, and where the words of their positions lie, are functions apart.

Letters: K N as in `nm_matmul`, here sizes of the weight; R, C  rows and columns of a tile
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false


@triton.jit
def split_groups(x):
    """Split a tile into the members of its groups of four consecutive columns.

    Args:
      x: any[R, C].

    Returns:
      tuple of four any[R, C / 4].
    """
    even, odd = tl.split(x.reshape([x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def select_two(w, mask):
    """Select the two kept values of each group of four consecutive columns.

    A group that keeps fewer is filled up with zeros; of one that keeps more, the first two count.

    Args:
      w: uint16[R, C].
      mask: int8[R, C], 1 where kept, else 0.

    Returns:
      tuple of both values uint16[R, C / 4], and of both positions uint32[R, C / 4], the first 0, 1
      or 2, the second behind it.
    """
    w0, w1, w2, w3 = split_groups(w)
    kept0, kept1, kept2, kept3 = split_groups(mask)
    # The first is 0 where none of 0, 1 and 2 is kept; the second is 3 where none is left.
    first_is_1 = (kept0 == 0) & (kept1 != 0)
    first_is_2 = ((kept0 | kept1) == 0) & (kept2 != 0)
    second_is_1 = (kept0 & kept1) != 0
    second_is_2 = ((kept0 ^ kept1) & kept2) != 0
    zero = tl.zeros_like(w0)
    first = tl.where(first_is_1, w1, tl.where(first_is_2, w2, tl.where(kept0 != 0, w0, zero)))
    second = tl.where(second_is_1, w1, tl.where(second_is_2, w2, tl.where(kept3 != 0, w3, zero)))
    first_at = tl.where(first_is_1, 1, tl.where(first_is_2, 2, 0)).to(tl.uint32)
    second_at = tl.where(second_is_1, 1, tl.where(second_is_2, 2, 3)).to(tl.uint32)
    return first, second, first_at, second_at


@triton.jit
def join_hopper_words(first_at, second_at):
    """Join positions to the words that `wgmma.mma_async.sp` reads, see `nm_matmul.packing`.

    Args:
      first_at, second_at: uint32[64, 16].

    Returns:
      uint32[128], words of the threads of a warpgroup.
    """
    # Row 16 warp + 8 half + row, group 4 quarter + group.
    code = (first_at | (second_at << 2)).reshape([4, 2, 8, 4, 4])
    half = tl.arange(0, 2).reshape([1, 2, 1, 1, 1])
    group = tl.arange(0, 4).reshape([1, 1, 1, 1, 4])
    # The bits lie apart, so that their sum joins them.
    bits = code << (16 * half + 4 * group).to(tl.uint32)
    return tl.sum(tl.sum(bits, axis=4), axis=1).reshape([128])


@triton.jit
def _pack_rows(w, mask, values, metadata, stride: tl.constexpr, TILE: tl.constexpr):
    """Pack a tile along its rows and store it.

    Args:
      w: uint16[64, 64].
      mask: int8[64, 64].
      values: pointer to the first value of the tile, rows `stride` apart.
      metadata: pointer to the first word of the tile.
    """
    first, second, first_at, second_at = select_two(w, mask)
    row, column = tl.arange(0, TILE), tl.arange(0, TILE // 2)
    both = tl.join(first, second).reshape([TILE, TILE // 2])
    tl.store(values + row[:, None] * stride + column[None, :], both)
    tl.store(metadata + tl.arange(0, 2 * TILE), join_hopper_words(first_at, second_at))


@triton.jit
def pack_nm(
    w, mask, values_k, metadata_k, values_n, metadata_n, K: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, ALONG_K: tl.constexpr, ALONG_N: tl.constexpr,
):  # fmt: skip
    """Pack one tile of a weight.

    Args:
      w: pointer to uint16[B, K, N], bits of the values.
      mask: to bool[B, K, N].
      values_k: to uint16[B, N, K / 2] or None, written.
      metadata_k: to uint32[B, N / 64, K / 64, 128] or None, written.
      values_n: to uint16[B, K, N / 2] or None, written.
      metadata_n: to uint32[B, K / 64, N / 64, 128] or None, written.
    """
    tiles_k: tl.constexpr = K // TILE
    tiles_n: tl.constexpr = N // TILE
    program = tl.program_id(0)
    b = (program // (tiles_k * tiles_n)).to(tl.int64)
    k, n = program // tiles_n % tiles_k, program % tiles_n
    # One tile is counted in 32 bits, all of them in 64.
    start = (b * K + k * TILE) * N + n * TILE
    line = tl.arange(0, TILE)
    at = line[:, None] * N + line[None, :]
    w_tile = tl.load(w + start + at)
    mask_tile = tl.load(mask + start + at).to(tl.int8)
    if ALONG_N:
        _pack_rows(
            w_tile, mask_tile, values_n + start // 2,
            metadata_n + ((b * tiles_k + k) * tiles_n + n) * (2 * TILE), N // 2, TILE,
        )  # fmt: skip
    if ALONG_K:
        turned = (b * N + n * TILE) * (K // 2) + k * (TILE // 2)
        _pack_rows(
            tl.trans(w_tile), tl.trans(mask_tile), values_k + turned,
            metadata_k + ((b * tiles_n + n) * tiles_k + k) * (2 * TILE), K // 2, TILE,
        )  # fmt: skip
