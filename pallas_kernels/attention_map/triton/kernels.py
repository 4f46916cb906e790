"""The kernels of the mean softmax map in Triton: log-sum-exp of rows, and the sum over heads.

  lse_t = log2 sum_s exp2(s_ts),  A = SHARE sum_bn exp2(s_bn - lse_bn),  s = scale log2 e q k^T

A program owns a tile of the result and goes through examples and heads, so nothing of a single
head's map is written. No two programs write the same element and every sum has one order: nothing
is atomic, and a repeated call agrees to the bit. Lengths need not be multiples of a tile: what lies
behind the last query or key is neither read nor written.

Letters: B T S N K H as everywhere (`sparsejax.types`), here sizes of one map; M  maps
PAD  head dim padded to a power of two      BQ, BK  queries and keys of a tile
SCALE  scale of the logits * log2 e
"""

import triton
import triton.language as tl

# Functions in Triton are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false


@triton.jit
def _load_rows(
    base, count, stride: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, PAD: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, PAD], zeros behind the head dim.

    Args:
      base: pointer to the first row; the others follow `stride` elements apart.
      count: rows that there are.
      CUT: whether that may be fewer than ROWS; zeros then stand for the others.

    Returns:
      float[ROWS, PAD].
    """
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, PAD)[None, :]
    at = base + row * stride + dim
    if CUT:
        inside = row < count
        if PAD != H:
            inside = inside & (dim < H)
        return tl.load(at, mask=inside, other=0.0)
    if PAD != H:
        return tl.load(at, mask=dim < H, other=0.0)
    return tl.load(at)


@triton.jit
def _count_keys(
    top, total, q_tile, rows, k_at, kv_mask_base, start, S: tl.constexpr, stride: tl.constexpr,
    SCALE: tl.constexpr, BK: tl.constexpr, H: tl.constexpr, PAD: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys, from `k_at`, into the running sum of exponentials."""
    cut: tl.constexpr = MASK and S % BK != 0
    k_tile = _load_rows(k_at, S - start, stride, BK, H, PAD, cut)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE
    if MASK:
        keys = start + tl.arange(0, BK)
        seen = keys[None, :] < S
        if CAUSAL:
            seen = seen & (rows[:, None] >= keys[None, :])
        if KEY_MASK:
            present = tl.load(kv_mask_base + keys, mask=keys < S, other=0)
            seen = seen & (present != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
    return new_top, total


@triton.jit
def attention_log_sum_exp(
    q, k, kv_mask, lse,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    PAD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of one tile of queries of a head.

    Args:
      q: pointer to float[B, T, N, H].
      k: to float[B, S, K, H].
      kv_mask: to int8[B, S] or None, 0 removes a key.
      lse: to f32[B, N, T], written, in base 2; +inf for a query that sees no key.
    """
    tiles: tl.constexpr = (T + BQ - 1) // BQ
    program = tl.program_id(0)
    # Tiles of late queries see the most keys of a causal call, and are started first.
    first = (tiles - 1 - program % tiles) * BQ
    n = program // tiles % N
    b = (program // (tiles * N)).to(tl.int64)
    rows = first + tl.arange(0, BQ)
    q_base = q + (b * T + first) * (N * H) + n * H
    k_at = k + b * S * K * H + (n // (N // K)) * H
    kv_mask_base = kv_mask
    if KEY_MASK:
        kv_mask_base = kv_mask + b * S
    q_tile = _load_rows(q_base, T - first, N * H, BQ, H, PAD, T % BQ != 0)
    # A finite start keeps a row that never sees a key clear of inf - inf.
    top = tl.full([BQ], -3.0e38, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    count = (S + BK - 1) // BK
    num_clear = S // BK
    if CAUSAL:
        count = tl.minimum((first + BQ + BK - 1) // BK, count)
        num_clear = tl.minimum((first + 1) // BK, num_clear)
    if KEY_MASK:
        num_clear = 0
    else:
        for step in range(0, num_clear):
            top, total = _count_keys(
                top, total, q_tile, rows, k_at, kv_mask_base, step * BK, S, K * H, SCALE, BK, H,
                PAD, CAUSAL, KEY_MASK, False,
            )  # fmt: skip
            k_at += BK * K * H
    if CAUSAL or KEY_MASK or S % BK != 0:
        for step in range(num_clear, count):
            top, total = _count_keys(
                top, total, q_tile, rows, k_at, kv_mask_base, step * BK, S, K * H, SCALE, BK, H,
                PAD, CAUSAL, KEY_MASK, True,
            )  # fmt: skip
            k_at += BK * K * H
    empty = total == 0
    value = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + (b * N + n) * T + rows, value, mask=rows < T)


@triton.jit
def mean_attention_map(
    q, k, kv_mask, lse, out,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SHARE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Write one tile of a part of a map: its share of the sum over examples and heads.

    Args:
      q: pointer to float[M * B, T, N, H].
      k: to float[M * B, S, K, H].
      kv_mask: to int8[M * B, S] or None, 0 removes a key.
      lse: to f32[M * B, N, T], in base 2; +inf for a row that adds nothing.
      out: to f32[M, PARTS, T, S], written.
      GROUP: tiles of queries that are taken together before the next tile of keys, for the cache.
      SHARE: factor of the sum.
    """
    tiles_q: tl.constexpr = (T + BQ - 1) // BQ
    tiles_k: tl.constexpr = (S + BK - 1) // BK
    program = tl.program_id(0)
    place = program // (tiles_q * tiles_k)
    part = place % PARTS
    tile = program % (tiles_q * tiles_k)
    first_tile = tile // (GROUP * tiles_k) * GROUP
    tall = tl.minimum(tiles_q - first_tile, GROUP)
    in_group = tile % (GROUP * tiles_k)
    query = (first_tile + in_group % tall) * BQ
    key = in_group // tall * BK
    first = part * (B * N) // PARTS
    last = (part + 1) * (B * N) // PARTS
    if CAUSAL:
        # A tile above the diagonal is zeros.
        last = tl.where(query + BQ > key, last, first)
    rows = query + tl.arange(0, BQ)
    keys = key + tl.arange(0, BK)
    acc = tl.zeros([BQ, BK], tl.float32)
    for step in range(first, last):
        b = (place // PARTS * B + step // N).to(tl.int64)
        n = step % N
        q_base = q + (b * T + query) * (N * H) + n * H
        k_base = k + (b * S + key) * (K * H) + (n // (N // K)) * H
        q_tile = _load_rows(q_base, T - query, N * H, BQ, H, PAD, T % BQ != 0)
        k_tile = _load_rows(k_base, S - key, K * H, BK, H, PAD, S % BK != 0)
        row_lse = tl.load(lse + (b * N + n) * T + rows, mask=rows < T, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p = tl.exp2(s * SCALE - row_lse[:, None])
        if KEY_MASK:
            present = tl.load(kv_mask + b * S + keys, mask=keys < S, other=0)
            p = tl.where((present != 0)[None, :], p, 0.0)
        acc += p
    if CAUSAL:
        # Once for all heads: what stands above the diagonal, infinity too, is dropped.
        acc = tl.where(rows[:, None] >= keys[None, :], acc, 0.0)
    base = out + (place.to(tl.int64) * T + query) * S + key
    at = base + tl.arange(0, BQ)[:, None] * S + tl.arange(0, BK)[None, :]
    inside = (rows[:, None] < T) & (keys[None, :] < S)
    tl.store(at, acc * SHARE, mask=inside)
