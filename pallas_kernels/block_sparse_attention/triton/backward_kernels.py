"""Block-sparse attention backward in Triton: one kernel for dQ, one for dK and dV.

Logits are computed again from the saved log-sum-exp:

  s = scale q k^T,  p = exp2(s log2 e - lse),  dp = dO v^T,  ds = p (dp - delta)
  dQ = scale ds K,  dV = p^T dO,  dK = scale ds^T Q

Letters: see `kernel_parts`; SCALE  scale * log2 e;  FACTOR  scale
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
def _add_query_gradient(
    acc, q_tile, d_out_tile, row_lse, row_delta, rows, row_segments, k_base, v_base, kv_mask_base,
    segments_base, start, stride: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    SEGMENTS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add ds K of one tile of keys."""
    keys = start + tl.arange(0, BK)
    k_tile = load_rows(k_base, keys, stride, H, PAD)
    v_tile = load_rows(v_base, keys, stride, H, PAD)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE
    p = tl.exp2(s - row_lse[:, None])
    if MASK:
        key_segments = keys
        if SEGMENTS:
            key_segments = tl.load(segments_base + keys)
        seen = see(
            rows[:, None], keys[None, :], row_segments[:, None], key_segments[None, :],
            CAUSAL, SEGMENTS,
        )  # fmt: skip
        if KEY_MASK:
            seen = seen & (tl.load(kv_mask_base + keys) != 0)[None, :]
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")


@triton.jit
def block_sparse_attention_backward_queries(
    q, k, v, d_out, lse, delta, kv_mask, segments, order, counts, leading, indices, dq,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, MB: tl.constexpr, MN: tl.constexpr, PQ: tl.constexpr,
    PK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    FACTOR: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr,
    CLEAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dq = FACTOR sum ds K of one tile of queries.

    Args:
      q, d_out: pointers to float[B, T, N, H].
      k, v: to float[B, S, K, H].
      lse, delta: to f32[B, N, T].
      kv_mask: to int8[B, S] or None, 0 removes a key.
      segments: to int32[B, T] or None.
      order: to int32[U], units in the order in which they are started.
      counts, leading, indices: to the arrays of `Lists`.
      dq: to float[B, T, N, H], written.
    """
    num_q: tl.constexpr = T // PQ
    num_kv: tl.constexpr = S // PK
    steps: tl.constexpr = PK // BK
    b, n, i, part = find_work(order, num_q, PQ // BQ, B, N, MB, MN)
    unit = find_unit(b, n, i, num_q, MB, MN)
    rows = i * PQ + part * BQ + tl.arange(0, BQ)
    b = b.to(tl.int64)
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
    q_tile = load_rows(q + b * T * N * H + n * H, rows, N * H, H, PAD)
    d_out_tile = load_rows(d_out + b * T * N * H + n * H, rows, N * H, H, PAD)
    row_lse = tl.load(lse + (b * N + n) * T + rows)
    row_delta = tl.load(delta + (b * N + n) * T + rows)
    acc = tl.zeros([BQ, PAD], tl.float32)
    count = tl.load(counts + unit)
    num_clear = count
    if MASKED:
        num_clear = tl.load(leading + unit)
    entries = indices + unit * num_kv
    if CLEAR:
        for step in range(0, num_clear * steps):
            start = tl.load(entries + step // steps) * PK + (step % steps) * BK
            acc = _add_query_gradient(
                acc, q_tile, d_out_tile, row_lse, row_delta, rows, row_segments, k_base, v_base,
                kv_mask_base, segments_base, start, K * H, SCALE, BK, H, PAD, CAUSAL, KEY_MASK,
                SEGMENTS, False,
            )  # fmt: skip
    if MASKED:
        for step in range(num_clear * steps, count * steps):
            start = tl.load(entries + step // steps) * PK + (step % steps) * BK
            acc = _add_query_gradient(
                acc, q_tile, d_out_tile, row_lse, row_delta, rows, row_segments, k_base, v_base,
                kv_mask_base, segments_base, start, K * H, SCALE, BK, H, PAD, CAUSAL, KEY_MASK,
                SEGMENTS, True,
            )  # fmt: skip
    store_rows(dq + b * T * N * H + n * H, rows, acc * FACTOR, N * H, H, PAD)


@triton.jit
def _add_key_gradients(
    dk_acc, dv_acc, k_tile, v_tile, keys, key_mask, key_segments, q_base, d_out_base, lse_base,
    delta_base, segments_base, start, stride: tl.constexpr, SCALE: tl.constexpr, BQ: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    SEGMENTS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add p^T dO and ds^T Q of one tile of queries; keys lie along the rows of its logits."""
    rows = start + tl.arange(0, BQ)
    q_tile = load_rows(q_base, rows, stride, H, PAD)
    d_out_tile = load_rows(d_out_base, rows, stride, H, PAD)
    s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * SCALE
    p = tl.exp2(s - tl.load(lse_base + rows)[None, :])
    if MASK:
        row_segments = rows
        if SEGMENTS:
            row_segments = tl.load(segments_base + rows)
        seen = see(
            rows[None, :], keys[:, None], row_segments[None, :], key_segments[:, None],
            CAUSAL, SEGMENTS,
        )  # fmt: skip
        if KEY_MASK:
            seen = seen & (key_mask != 0)[:, None]
        p = tl.where(seen, p, 0.0)
    dv_acc = tl.dot(p.to(d_out_tile.dtype), d_out_tile, dv_acc, input_precision="ieee")
    dp = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
    ds = p * (dp - tl.load(delta_base + rows)[None, :])
    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit
def block_sparse_attention_backward_keys(
    q, k, v, d_out, lse, delta, kv_mask, segments, order, counts, leading, indices, dk, dv,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, MB: tl.constexpr, MN: tl.constexpr, PQ: tl.constexpr,
    PK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    FACTOR: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr,
    CLEAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dv = sum p^T dO and dk = FACTOR sum ds^T Q of one tile of keys.

    The sums run over the query heads that read the key head, each with its list. These begin with
    the blocks that need a mask.

    Args:
      q, d_out: pointers to float[B, T, N, H].
      k, v: to float[B, S, K, H].
      lse, delta: to f32[B, N, T].
      kv_mask: to int8[B, S] or None, 0 removes a key.
      segments: to int32[B, T] or None.
      order: to int32[U], units in the order in which they are started.
      counts, leading, indices: to the arrays of `Lists`.
      dk, dv: to float[B, S, K, H], written.
    """
    num_q: tl.constexpr = T // PQ
    num_kv: tl.constexpr = S // PK
    steps: tl.constexpr = PQ // BQ
    group: tl.constexpr = N // K
    b, head, j, part = find_work(order, num_kv, PK // BK, B, K, MB, K if MN > 1 else 1)
    keys = j * PK + part * BK + tl.arange(0, BK)
    b_long = b.to(tl.int64)
    kv_offset = b_long * S * K * H + head * H
    segments_base = segments
    key_mask = keys
    key_segments = keys
    if KEY_MASK:
        key_mask = tl.load(kv_mask + b_long * S + keys)
    if SEGMENTS:
        segments_base = segments + b_long * T
        key_segments = tl.load(segments_base + keys)
    k_tile = load_rows(k + kv_offset, keys, K * H, H, PAD)
    v_tile = load_rows(v + kv_offset, keys, K * H, H, PAD)
    dk_acc = tl.zeros([BK, PAD], tl.float32)
    dv_acc = tl.zeros([BK, PAD], tl.float32)
    for member in range(0, group):
        n = head * group + member
        unit = find_unit(b, n, j, num_kv, MB, MN)
        count = tl.load(counts + unit)
        num_masked = 0
        if MASKED:
            num_masked = tl.load(leading + unit)
        entries = indices + unit * num_q
        q_base = q + b_long * T * N * H + n * H
        d_out_base = d_out + b_long * T * N * H + n * H
        lse_base = lse + (b_long * N + n) * T
        delta_base = delta + (b_long * N + n) * T
        if MASKED:
            for step in range(0, num_masked * steps):
                start = tl.load(entries + step // steps) * PQ + (step % steps) * BQ
                dk_acc, dv_acc = _add_key_gradients(
                    dk_acc, dv_acc, k_tile, v_tile, keys, key_mask, key_segments, q_base,
                    d_out_base, lse_base, delta_base, segments_base, start, N * H, SCALE, BQ, H,
                    PAD, CAUSAL, KEY_MASK, SEGMENTS, True,
                )  # fmt: skip
        if CLEAR:
            for step in range(num_masked * steps, count * steps):
                start = tl.load(entries + step // steps) * PQ + (step % steps) * BQ
                dk_acc, dv_acc = _add_key_gradients(
                    dk_acc, dv_acc, k_tile, v_tile, keys, key_mask, key_segments, q_base,
                    d_out_base, lse_base, delta_base, segments_base, start, N * H, SCALE, BQ, H,
                    PAD, CAUSAL, KEY_MASK, SEGMENTS, False,
                )  # fmt: skip
    store_rows(dk + kv_offset, keys, dk_acc * FACTOR, K * H, H, PAD)
    store_rows(dv + kv_offset, keys, dv_acc, K * H, H, PAD)
