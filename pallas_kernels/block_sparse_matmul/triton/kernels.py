"""The products with a block-sparse weight in Triton: two kernels.

A program of the first computes one tile of y = x w + bias, or of dx = dy w^T, and walks the list of
kept blocks of its column. A program of the second computes one tile of dw = x^T dy over all tokens,
or writes zeros. Lists and counts are read from memory, so a mask may change between two calls of
one compiled kernel. No two programs write the same element.

Letters: B examples, which vmap makes; arrays that all of them share have a leading axis of 1
M tokens    C contracted axis    N columns of the result    U lists    P entries of a list
INNER, OUTER  sides of a weight's block along C and N      BM, BN, BK  tile of a program's step
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false


@triton.jit
def block_sparse_matmul_rows(
    x, w, bias, order, counts, entries, out,
    B: tl.constexpr, XB: tl.constexpr, WB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, U: tl.constexpr, P: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, INNER_STRIDE: tl.constexpr, OUTER_STRIDE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Write one tile of x w + bias, a sum over the kept blocks of its column.

    Row tiles are taken in groups of GROUP: all lists, longest first, for one group before the next,
    so that rows of x stay in the cache while every column reads them.

    Args:
      x: pointer to float[XB, M, C]; XB is B or 1.
      w: to float[WB, ...], C by N elements that INNER_STRIDE and OUTER_STRIDE place.
      bias: to float[B, N] or None.
      order: to int32[LB * U], lists in the order in which they are started; LB is B or 1.
      counts: to int32[LB, U], how many blocks of each column are kept.
      entries: to int32[LB, U, P], which.
      out: to float[B, M, N], written.
    """
    parts: tl.constexpr = OUTER // BN
    steps: tl.constexpr = INNER // BK
    row_tiles: tl.constexpr = (M + BM - 1) // BM
    sharing: tl.constexpr = B // LB
    items: tl.constexpr = LB * U * parts
    program = tl.program_id(0)
    group = program // (GROUP * items)
    place = program - group * (GROUP * items)
    size = tl.minimum(row_tiles * sharing - group * GROUP, GROUP)
    row_item = group * GROUP + place % size
    item = place // size
    unit = tl.load(order + item // parts)
    b = (unit // U * sharing + row_item // row_tiles).to(tl.int64)
    columns = unit % U * OUTER + item % parts * BN + tl.arange(0, BN)
    start = (row_item % row_tiles).to(tl.int64) * BM
    rows = tl.arange(0, BM)
    # Behind the last row its values are read again, and not written.
    read = rows
    if M % BM:
        read = tl.minimum(rows, (M - 1 - start).to(tl.int32))
    x_base = x + start * C
    w_base = w
    if XB > 1:
        x_base = x_base + b * (M * C)
    if WB > 1:
        w_base = w_base + b * (C * N)
    acc = tl.zeros([BM, BN], tl.float32)
    depth = tl.arange(0, BK)
    listed = entries + unit * P
    # Where the next step reads is looked up a step ahead: tiles are then copied as far ahead as
    # there are stages, and not half as far, behind their place on the list.
    at = tl.load(listed) * INNER
    for step in range(0, tl.load(counts + unit) * steps):
        x_tile = tl.load(x_base + read[:, None] * C + (at + depth)[None, :])
        w_tile = tl.load(
            w_base + (at + depth)[:, None] * INNER_STRIDE + columns[None, :] * OUTER_STRIDE
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        following = step + 1
        entry = tl.load(listed + tl.minimum(following // steps, P - 1))
        at = entry * INNER + following % steps * BK
    if BIAS:
        acc += tl.load(bias + b * N + columns).to(tl.float32)[None, :]
    to = out + (b * M + start) * N + rows[:, None] * N + columns[None, :]
    value = acc.to(out.dtype.element_ty)
    if M % BM:
        tl.store(to, value, mask=(rows < M - start)[:, None])
    else:
        tl.store(to, value)


@triton.jit
def block_sparse_matmul_gradient(
    x, dy, order, kept, out,
    B: tl.constexpr, XB: tl.constexpr, YB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, J: tl.constexpr, U: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write one tile of x^T dy, of a kept block, or of zeros.

    Args:
      x: pointer to float[XB, M, C]; XB is B or 1.
      dy: to float[YB, M, N]; YB is B or 1.
      order: to int32[LB * U], blocks in the order in which they are started; LB is B or 1.
      kept: to int32[LB, U], 1 where the gradient of a block is wanted, else 0; U = I * J.
      out: to float[B, C, N], written.
    """
    sharing: tl.constexpr = B // LB
    row_parts: tl.constexpr = INNER // BM
    parts: tl.constexpr = row_parts * (OUTER // BN)
    full: tl.constexpr = M // BK
    program = tl.program_id(0)
    unit = tl.load(order + program // (sharing * parts))
    b = (unit // U * sharing + program // parts % sharing).to(tl.int64)
    block = unit % U
    part = program % parts
    rows = block // J * INNER + part % row_parts * BM + tl.arange(0, BM)
    columns = block % J * OUTER + part // row_parts * BN + tl.arange(0, BN)
    x_base = x
    dy_base = dy
    if XB > 1:
        x_base = x_base + b * (M * C)
    if YB > 1:
        dy_base = dy_base + b * (M * N)
    acc = tl.zeros([BM, BN], tl.float32)
    tokens = tl.arange(0, BK)
    x_at = x_base + rows[:, None] + tokens[None, :] * C
    dy_at = dy_base + tokens[:, None] * N + columns[None, :]
    is_kept = tl.load(kept + unit)
    for _ in range(0, is_kept * full):
        acc = tl.dot(tl.load(x_at), tl.load(dy_at), acc, input_precision="ieee")
        x_at += BK * C
        dy_at += BK * N
    if M % BK:
        left = tokens < M % BK * is_kept
        x_tile = tl.load(x_at, mask=left[None, :], other=0.0)
        dy_tile = tl.load(dy_at, mask=left[:, None], other=0.0)
        acc = tl.dot(x_tile, dy_tile, acc, input_precision="ieee")
    to = out + b * (C * N) + rows[:, None] * N + columns[None, :]
    tl.store(to, acc.to(out.dtype.element_ty))
