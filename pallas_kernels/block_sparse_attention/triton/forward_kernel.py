"""Block-sparse attention forward in Triton, with a running softmax.

  s = scale q k^T,  out = sum exp2(s log2 e - lse) v

Letters: see `kernel_parts`; SCALE  scale * log2 e
"""

import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.triton.kernel_parts import (
    find_unit,
    find_work,
    load_rows,
    see,
    store_rows,
)

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false


@triton.jit
def _attend_tile(
    top, total, acc, counted, q_tile, rows, row_segments, k_base, v_base, kv_mask_base,
    segments_base, start, stride: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    SEGMENTS: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax."""
    keys = start + tl.arange(0, BK)
    k_tile = load_rows(k_base, keys, stride, H, PAD)
    v_tile = load_rows(v_base, keys, stride, H, PAD)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE
    if MASK:
        key_segments = keys
        if SEGMENTS:
            key_segments = tl.load(segments_base + keys)
        seen = see(
            rows[:, None], keys[None, :], row_segments[:, None], key_segments[None, :],
            CAUSAL, SEGMENTS,
        )  # fmt: skip
        if COUNT:
            counted += tl.sum(seen.to(tl.int32), 1)
        if KEY_MASK:
            seen = seen & (tl.load(kv_mask_base + keys) != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    elif COUNT:
        counted += BK
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return new_top, total, acc, counted


@triton.jit
def block_sparse_attention_forward(
    q, k, v, kv_mask, segments, order, counts, leading, indices, out, lse, kept,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, MB: tl.constexpr, MN: tl.constexpr, PQ: tl.constexpr,
    PK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr, COUNT: tl.constexpr,
    CLEAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the output and the log-sum-exp of one tile of queries.

    Args:
      q: pointer to float[B, T, N, H].
      k, v: to float[B, S, K, H].
      kv_mask: to int8[B, S] or None, 0 removes a key.
      segments: to int32[B, T] or None.
      order: to int32[U], units in the order in which they are started.
      counts, leading, indices: to the arrays of `Lists`.
      out: to float[B, T, N, H], written; 0 for a query without a key.
      lse: to f32[B, N, T], written; -inf for a query without a key.
      kept: to int32[B, N, T] or None, written: positions that a query sees in its blocks.
    """
    num_q: tl.constexpr = T // PQ
    num_kv: tl.constexpr = S // PK
    steps: tl.constexpr = PK // BK
    b, n, i, part = find_work(order, num_q, PQ // BQ, B, N, MB, MN)
    unit = find_unit(b, n, i, num_q, MB, MN)
    rows = i * PQ + part * BQ + tl.arange(0, BQ)
    b = b.to(tl.int64)
    q_base = q + b * T * N * H + n * H
    k_base = k + b * S * K * H + (n // (N // K)) * H
    v_base = v + b * S * K * H + (n // (N // K)) * H
    kv_mask_base = kv_mask
    segments_base = segments
    row_segments = rows
    if KEY_MASK:
        kv_mask_base = kv_mask + b * S
    if SEGMENTS:
        segments_base = segments + b * T
        row_segments = tl.load(segments_base + rows)
    q_tile = load_rows(q_base, rows, N * H, H, PAD)
    # A finite start keeps a row that never sees a key clear of inf - inf.
    top = tl.full([BQ], -3.0e38, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, PAD], tl.float32)
    counted = tl.zeros([BQ], tl.int32)
    count = tl.load(counts + unit)
    num_clear = count
    if MASKED:
        num_clear = tl.load(leading + unit)
    entries = indices + unit * num_kv
    if CLEAR:
        for step in range(0, num_clear * steps):
            start = tl.load(entries + step // steps) * PK + (step % steps) * BK
            top, total, acc, counted = _attend_tile(
                top, total, acc, counted, q_tile, rows, row_segments, k_base, v_base,
                kv_mask_base, segments_base, start, K * H, SCALE, BK, H, PAD, CAUSAL, KEY_MASK,
                SEGMENTS, COUNT, False,
            )  # fmt: skip
    if MASKED:
        for step in range(num_clear * steps, count * steps):
            start = tl.load(entries + step // steps) * PK + (step % steps) * BK
            top, total, acc, counted = _attend_tile(
                top, total, acc, counted, q_tile, rows, row_segments, k_base, v_base,
                kv_mask_base, segments_base, start, K * H, SCALE, BK, H, PAD, CAUSAL, KEY_MASK,
                SEGMENTS, COUNT, True,
            )  # fmt: skip
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    store_rows(out + b * T * N * H + n * H, rows, acc / divisor[:, None], N * H, H, PAD)
    at = (b * N + n) * T + rows
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log2(divisor)))
    if COUNT:
        tl.store(kept + at, counted)
