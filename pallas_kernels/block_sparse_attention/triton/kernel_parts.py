"""What the attention kernels in Triton share: which tile a program computes, and its rows.

A program keeps one tile of queries, or of keys, and walks a list of pattern blocks of the other
side. Counts and indices of the lists are read from memory, so a mask may change between two calls
of one compiled kernel. A pattern block is walked in tiles that may be smaller. No two programs
write the same element, so nothing is atomic and a repeated call agrees to the bit.

Lists hold their blocks without a mask apart from those that need one; constants `CLEAR` and
`MASKED` say which of the two kinds can occur. Softmax and log-sum-exp are in base 2.

Letters: B T S N K H as everywhere (`sparsejax.types`), here sizes of the call;
PAD  head dim padded to a power of two      MB, MN  masks that differ, by batch and by head
BQ, BK  queries and keys of a tile          PQ, PK  queries and keys of a pattern block
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false


@triton.jit
def load_rows(base, rows, stride: tl.constexpr, H: tl.constexpr, PAD: tl.constexpr):
    """Load [rows, PAD], zeros behind the head dim.

    Args:
      base: pointer to the first position of an example and a head.
      rows: int32[rows], positions; `stride` elements apart.

    Returns:
      float[rows, PAD].
    """
    dim = tl.arange(0, PAD)
    at = base + rows[:, None] * stride + dim[None, :]
    if PAD == H:
        return tl.load(at)
    return tl.load(at, mask=dim[None, :] < H, other=0.0)


@triton.jit
def store_rows(base, rows, value, stride: tl.constexpr, H: tl.constexpr, PAD: tl.constexpr):
    """Store [rows, PAD] up to the head dim, rounded to the dtype of the pointer.

    Args:
      base: pointer to the first position of an example and a head.
      rows: int32[rows], positions; `stride` elements apart.
      value: f32[rows, PAD].
    """
    dim = tl.arange(0, PAD)
    at = base + rows[:, None] * stride + dim[None, :]
    if PAD == H:
        tl.store(at, value.to(base.dtype.element_ty))
    else:
        tl.store(at, value.to(base.dtype.element_ty), mask=dim[None, :] < H)


@triton.jit
def find_work(order, blocks: tl.constexpr, parts: tl.constexpr, B: tl.constexpr,
               heads: tl.constexpr, MB: tl.constexpr, mask_heads: tl.constexpr):  # fmt: skip
    """Find what a program computes.

    A unit is a pattern block of one mask. Its programs differ in the example and head that share
    the mask, and in the tile of the block.

    Args:
      order: pointer to int32[U], units in the order in which they are started.
      blocks: pattern blocks along the side that stays.
      parts: tiles of a pattern block along it.
      heads: heads along it: N, or K of keys.
      mask_heads: of these, how many have lists of their own; or 1.

    Returns:
      tuple of the example, the head, the pattern block and the tile in it.
    """
    sharing: tl.constexpr = (B // MB) * (heads // mask_heads)
    program = tl.program_id(0)
    unit = tl.load(order + program // (sharing * parts))
    rest = program % (sharing * parts)
    share = rest // parts
    mask = unit // blocks
    b = mask // mask_heads + share // (heads // mask_heads)
    head = mask % mask_heads + share % (heads // mask_heads)
    return b, head, unit % blocks, rest % parts


@triton.jit
def find_unit(b, n, block, blocks: tl.constexpr, MB: tl.constexpr, MN: tl.constexpr):
    """Find the list of a pattern block.

    Args:
      b: example.
      n: query head.
      block: pattern block.
      blocks: pattern blocks along its side.

    Returns:
      place of the list among all of its side.
    """
    mask = 0
    if MB > 1:
        mask = b * MN
    if MN > 1:
        mask = mask + n
    return mask * blocks + block


@triton.jit
def see(q_at, kv_at, q_segments, kv_segments, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr):
    """Find which queries see which keys, the key mask aside.

    Args:
      q_at, kv_at: positions, those of one side along rows, of the other along columns.
      q_segments, kv_segments: their segments, if there are any.

    Returns:
      bool[rows, columns].
    """
    seen = (q_at >= 0) & (kv_at >= 0)
    if CAUSAL:
        seen = seen & (q_at >= kv_at)
    if SEGMENTS:
        seen = seen & (q_segments == kv_segments)
    return seen
