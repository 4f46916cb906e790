"""Packing in Triton: a weight by its mask, and a gradient while it is pruned.

A weight is packed along one axis or both, a gradient along its tokens. A program has one tile of
64 x 64, so that along either axis it writes whole words of metadata. To pack along K, or along
tokens, it turns the tile, which goes through shared memory.
Which two members of a group are kept, and where the words of their positions lie, are functions
apart. What is read is read once.

Letters: M K N as in `nm_matmul`, here sizes of the array; R, C  rows and columns of a tile
"""

import triton
import triton.language as tl

from pallas_kernels.nm_matmul.triton.prune_kernel import draw_two

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
def select_two(w0, w1, w2, w3, kept0, kept1, kept2, kept3):
    """Select the two kept values of each group of four.

    A group that keeps fewer is filled up with zeros; of one that keeps more, the first two count.

    Args:
      w0, w1, w2, w3: any[R, C], members of the groups.
      kept0, kept1, kept2, kept3: int8[R, C], 1 where kept, else 0.

    Returns:
      tuple of both values any[R, C], and of both positions uint32[R, C], the first 0, 1 or 2, the
      second behind it.
    """
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
    """Join positions to the words that `wgmma.mma_async.sp` and `mma.sp` read.

    See `nm_matmul.packing`.

    Args:
      first_at, second_at: uint32[64, 16].

    Returns:
      uint32[128], words of the threads of four warps.
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
    w0, w1, w2, w3 = split_groups(w)
    kept0, kept1, kept2, kept3 = split_groups(mask)
    first, second, first_at, second_at = select_two(w0, w1, w2, w3, kept0, kept1, kept2, kept3)
    _store_packed(first, second, first_at, second_at, values, metadata, stride, TILE)


@triton.jit
def _store_packed(
    first, second, first_at, second_at, values, metadata, stride: tl.constexpr, TILE: tl.constexpr
):
    """Store the kept values of 64 rows and 16 groups, and the words of their positions."""
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


@triton.jit
def prune_and_pack(
    x, bits, values, metadata, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Prune one tile of a gradient to two of every four consecutive rows, and pack them.

    Args:
      x: pointer to float[B, M, N].
      bits: to uint32[B, M / 4, N], random.
      values: to float[B, N, M / 2], written.
      metadata: to uint32[B, N / 64, M / 64, 128], written.
    """
    tiles_m: tl.constexpr = M // TILE
    tiles_n: tl.constexpr = N // TILE
    program = tl.program_id(0)
    b = (program // (tiles_m * tiles_n)).to(tl.int64)
    m, n = program // tiles_n % tiles_m, program % tiles_n
    group, column = tl.arange(0, TILE // 4)[:, None], tl.arange(0, TILE)[None, :]
    start = x + (b * M + m * TILE) * N + n * TILE
    at = group * (4 * N) + column
    x0, x1 = tl.load(start + at).to(tl.float32), tl.load(start + N + at).to(tl.float32)
    x2, x3 = tl.load(start + 2 * N + at).to(tl.float32), tl.load(start + 3 * N + at).to(tl.float32)
    random = tl.load(bits + (b * M + m * TILE) // 4 * N + n * TILE + (group * N + column))
    dtype = values.dtype.element_ty
    v0, v1, v2, v3, k0, k1, k2, k3 = draw_two(x0, x1, x2, x3, random, dtype, EXACT)
    first, second, first_at, second_at = select_two(
        v0, v1, v2, v3, k0.to(tl.int8), k1.to(tl.int8), k2.to(tl.int8), k3.to(tl.int8)
    )
    _store_packed(
        tl.trans(first), tl.trans(second), tl.trans(first_at), tl.trans(second_at),
        values + (b * N + n * TILE) * (M // 2) + m * (TILE // 2),
        metadata + ((b * tiles_n + n) * tiles_m + m) * (2 * TILE), M // 2, TILE,
    )  # fmt: skip
