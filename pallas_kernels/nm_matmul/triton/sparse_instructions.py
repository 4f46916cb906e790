"""What `product_kernel` writes in PTX itself: sparse products, and the waits for its copies.

Functions here run while the kernel is compiled, on the names of a thread's registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_DEPTH = 64


@gluon.constexpr_function
def _write_products(outputs, inputs, dtype):
    """Write the instructions of one step.

    Registers come in the order of their layouts: blocks of 16 rows or of 8 columns, then parts of
    the contraction, then the words of a fragment. Of B read turned, halves of words come.

    Args:
      outputs: names of the sums.
      inputs: names of the sums before, of the words of A and of B, and of a word of the metadata
        for each block of rows; no metadata if A is dense.
      dtype: "bf16" or "f16".
    """
    (sums,) = outputs
    before, a, b, *metadata = inputs
    # Of a thread, A has 4 words for each block of rows and part of the contraction, and the sums 4
    # for each block of rows and of columns.
    words_b = 4 if metadata else 2
    parts = (_DEPTH // 32) if metadata else (_DEPTH // 16)
    blocks_r = len(a) // (4 * parts)
    blocks_p = len(sums) // (4 * blocks_r)
    lines = []
    if len(b) == 2 * words_b * blocks_p * parts:
        words = [f"word{i}" for i in range(len(b) // 2)]
        lines.append(f".reg .b32 {', '.join(words)};")
        pairs = zip(words, b[::2], b[1::2], strict=True)
        lines += [f"mov.b32 {word}, {{{low}, {high}}};" for word, low, high in pairs]
        b = words
    name = (
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32"
        if metadata
        else "mma.sync.aligned.m16n8k16"
    )
    for part in range(parts):
        for r in range(blocks_r):
            # One word of metadata describes both parts; the instruction is told which.
            described = f", {metadata[0][r]}, 0x{part}" if metadata else ""
            for p in range(blocks_p):
                at = 4 * (r * blocks_p + p)
                added = sums if part else before
                fragments = (
                    sums[at : at + 4],
                    a[4 * (r * parts + part) :][:4],
                    b[words_b * (p * parts + part) :][:words_b],
                    added[at : at + 4],
                )
                operands = ", ".join(f"{{{', '.join(names)}}}" for names in fragments)
                lines.append(f"{name}.row.col.f32.{dtype}.{dtype}.f32 {operands}{described};")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def write_bfloat16(outputs, inputs):
    """Write the instructions of one step, of bfloat16.

    Args:
      outputs: see `_write_products`.
      inputs: likewise.

    Returns:
      str, a block of PTX.
    """
    return _write_products(outputs, inputs, "bf16")


@gluon.constexpr_function
def write_float16(outputs, inputs):
    """Write the instructions of one step, of float16.

    Args:
      outputs: see `_write_products`.
      inputs: likewise.

    Returns:
      str, a block of PTX.
    """
    return _write_products(outputs, inputs, "f16")


@gluon.constexpr_function
def write_wait(groups):
    """Write the wait for all but the last groups of copies.

    `async_copy.wait_group` says the same, but jax-triton 0.4.1 compiles Gluon as if it were Triton,
    and Triton's pipeliner makes every wait one for all groups.

    Args:
      groups: int, how many may be outstanding.

    Returns:
      str, an instruction of PTX.
    """
    return f"cp.async.wait_group {groups};"


@gluon.constexpr_function
def metadata_layout(strips, warps_r, warps_p):
    """Return the layout of words [strips, 32]: a lane holds its word of each strip of its warp.

    Warps take strips of 16 rows in turn, as they take rows of the sums.

    Args:
      strips: int, rows of a tile by 16.
      warps_r, warps_p: int, warps along rows and columns of a tile.

    Returns:
      DistributedLinearLayout of [strips, 32], with strips / warps_r registers in each thread.
    """
    powers = [1 << i for i in range(strips.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[i, 0] for i in powers if i >= warps_r],
        lane_bases=[[0, 1 << i] for i in range(5)],
        warp_bases=[[0, 0]] * (warps_p.bit_length() - 1) + [[i, 0] for i in powers if i < warps_r],
        block_bases=[],
        shape=[strips, 32],
    )
