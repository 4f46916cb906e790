"""A 2:4 sparse matrix times a dense one on the sparse tensor cores of Ampere and later, in Gluon.

  out[P, R] = act(A[R, C] B[C, P] + bias[R])^T,  A 2:4 sparse along C

`mma.sp` multiplies 16 rows of A by 32 positions of the contraction, of which A keeps 16, and by 8
columns of B. Only its left operand may be sparse, so each product of `nm_matmul` is computed
transposed and turned while it is written.

A program has a tile of the result. It copies tiles of A's values, of their metadata and of B into a
ring in shared memory, `STAGES` - 1 steps ahead, and multiplies the oldest:

  step k:  wait until its tile is there, for all warps;
           start copying the tile of step k + STAGES - 1 to the slot that step k - 1 has left;
           read the tile of step k into fragments (`ldmatrix`) and multiply.

With a gate, a tile has as many rows of values as of gates, and one thread holds both of a place.

Letters: R rows, C columns of the sparse operand, P columns of the dense one
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from pallas_kernels.nm_matmul.triton.sparse_instructions import (
    metadata_layout,
    write_bfloat16,
    write_float16,
    write_wait,
)

# Functions in Gluon are not Python: values of a kernel have types that Python knows nothing of.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportPossiblyUnboundVariable=false

# Positions of the contraction that a step covers: two instructions, which share their metadata.
_DEPTH = gl.constexpr(64)
# 16-byte pieces, in words of 32 bits and in numbers of 16.
_WORDS, _NUMBERS = gl.constexpr(4), gl.constexpr(8)
# 2 sqrt(2 / pi), of the tanh form of GELU.
_LINEAR = gl.constexpr(1.5957691216057308)
_CUBIC = gl.constexpr(0.044715 * 1.5957691216057308)


@gluon.jit
def _copy_step(
    step, slot, values_at, metadata_at, dense_at, values, metadata, dense,
    P: gl.constexpr, PARTS: gl.constexpr, TURNED: gl.constexpr, IS_SPARSE: gl.constexpr,
):  # fmt: skip
    """Start copying the tile of a step to a slot of the ring.

    Args:
      values_at: tuple of pointers to the words of the first step, one for each part.
      metadata_at: likewise, empty if A is dense.
      dense_at: pointer likewise.
      values, metadata, dense: the rings.
    """
    # Sizes of one tile are counted in 32 bits, all others in 64.
    far = gl.to_tensor(step).to(gl.int64)
    words: gl.constexpr = values.shape[2]
    for part in gl.static_range(PARTS):
        place = slot * PARTS + part
        async_copy.async_load(values.index(place), values_at[part] + step * words)
        if IS_SPARSE:
            async_copy.async_load(metadata.index(place), metadata_at[part] + step * 128)
    if TURNED:
        async_copy.async_load(dense.index(slot), dense_at + far * (_DEPTH * P))
    else:
        async_copy.async_load(dense.index(slot), dense_at + step * (_DEPTH // 2))


@gluon.jit
def _gelu(z):
    # The tanh form, see `nm_matmul.activations`.
    return z / (1 + gl.exp(-z * (_LINEAR + _CUBIC * (z * z))))


@gluon.jit
def _silu(z):
    return z / (1 + gl.exp(-z))


@gluon.jit
def _halve(x):
    """Split [BR, BP] into two of [BR, BP / 2]."""
    return gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)))


@gluon.jit
def _store_turned(out, tile, row, column, columns, width: gl.constexpr, warps: gl.constexpr):
    """Write a tile [BR, BP] to out[P, width] from row and column on.

    Args:
      out: pointer to the first element of the example.
      tile: float[BR, BP], in the layout of the sums.
      row: int, of A, of the tile's first element.
      column: int64, of B, likewise.
      columns: int64, of B, beyond which there are none.
    """
    BR: gl.constexpr = tile.shape[0]
    lanes: gl.constexpr = min(32, BR // _NUMBERS)
    layout: gl.constexpr = gl.BlockedLayout([_NUMBERS, 1], [lanes, 32 // lanes], [1, warps], [0, 1])
    turned = gl.convert_layout(tile.to(out.dtype.element_ty), layout)
    r = gl.arange(0, BR, gl.SliceLayout(1, layout))
    p = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    start = out + column * width + row
    is_there = (p < columns - column)[None, :] & (r >= 0)[:, None]
    gl.store(start + (p[None, :] * width + r[:, None]), turned, mask=is_there)


@gluon.jit
def _finish(
    sums, bias, inputs, out, row, column, R: gl.constexpr, P: gl.constexpr, PARTS: gl.constexpr,
    ACTIVATION: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Add the bias, apply the activation and write.

    Args:
      sums: tuple of f32[BR, BP], values and, if `PARTS` is 2, gates.
      bias, inputs, out: pointers to the example's; the first two may be None.
      row: int, of A, of the first value.
      column: int64, of B, likewise.
    """
    WIDTH: gl.constexpr = R // PARTS
    ROWS: gl.constexpr = sums[0].shape[0]
    layout: gl.constexpr = sums[0].type.layout
    biased = ()
    for part in gl.static_range(PARTS):
        z = sums[part]
        first = row + part * WIDTH
        if bias is not None:
            r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            z += gl.load(bias + first + r).to(gl.float32)[:, None]
        if inputs is not None:
            _store_turned(inputs, z, first, column, P, R, warps)
        biased += (z,)
    if ACTIVATION == "gelu":
        y = _gelu(biased[0])
    elif ACTIVATION == "geglu":
        y = biased[0] * _gelu(biased[1])
    elif ACTIVATION == "swiglu":
        y = biased[0] * _silu(biased[1])
    else:
        y = biased[0]
    _store_turned(out, y, row, column, P, WIDTH, warps)


@gluon.jit
def multiply_sparse(
    values, metadata, dense, bias, out, inputs, R: gl.constexpr, C: gl.constexpr, P: gl.constexpr,
    VALUES: gl.constexpr, DENSE: gl.constexpr, BIAS: gl.constexpr, BR: gl.constexpr,
    BP: gl.constexpr, WARPS_R: gl.constexpr, WARPS_P: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SPLITS: gl.constexpr, PARTS: gl.constexpr, TURNED: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Compute one tile of the result.

    Args:
      values: pointer to 16-bit floats[VALUES, R, C / 2]; [VALUES, R, C] if A is dense, for
        comparison.
      metadata: to uint32[VALUES, R / 64, C / 64, 128], see `nm_matmul.packing`; None if A is dense.
      dense: to floats[DENSE, P, C], or [DENSE, C, P] if `TURNED`.
      bias: to floats[BIAS, R] or None.
      out: to floats[B * SPLITS, P, R], or [B, P, R / 2] if the activation is gated, written.
      inputs: to floats[B, P, R] or None, written: what the activation is applied to.
      R, C, P: sizes; C is a multiple of 64, and R of `BR`. P is one of `BP` if `TURNED`.
      VALUES, DENSE, BIAS: how many there are: as many as examples, or 1, which all share.
      BR, BP: sides of a tile; with a gate, half of the rows of a tile are gates. Rows of either
        kind are a multiple of 64.
      WARPS_R, WARPS_P: warps along them.
      STAGES: slots of the ring, at least 2.
      GROUP: tiles along P that are taken together, so that they stay in the cache.
      SPLITS: parts of the contraction, each with a result of its own; none is empty.
      PARTS: kinds of rows: 2 if some are gates, else 1.
      TURNED: see `dense`.
      ACTIVATION: None, "gelu", "geglu" or "swiglu"; None if there are several parts.
    """
    is_sparse: gl.constexpr = metadata is not None
    ROWS: gl.constexpr = BR // PARTS
    WIDTH: gl.constexpr = R // PARTS
    STRIPS: gl.constexpr = ROWS // 16
    warps: gl.constexpr = WARPS_R * WARPS_P
    all_steps: gl.constexpr = C // _DEPTH
    most_steps: gl.constexpr = (all_steps + SPLITS - 1) // SPLITS
    # Of A, in words of 32 bits: a row, and what a step reads of it.
    row_words: gl.constexpr = C // 4 if is_sparse else C // 2
    step_words: gl.constexpr = _DEPTH // 4 if is_sparse else _DEPTH // 2
    dtype: gl.constexpr = values.dtype.element_ty
    write: gl.constexpr = write_bfloat16 if dtype == gl.bfloat16 else write_float16

    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_R, WARPS_P], [16, 8])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 1)
    word_layout: gl.constexpr = metadata_layout(STRIPS, WARPS_R, WARPS_P)
    # 16 bytes a thread, and a row of 32 words by eight threads.
    copy_words: gl.constexpr = gl.BlockedLayout([1, _WORDS], [4, 8], [warps, 1], [1, 0])
    row_memory: gl.constexpr = gl.SwizzledSharedLayout(_WORDS, 1, 8, [1, 0])
    if is_sparse:
        copy_values: gl.constexpr = gl.BlockedLayout([1, _WORDS], [8, 4], [warps, 1], [1, 0])
        value_memory: gl.constexpr = gl.SwizzledSharedLayout(_WORDS, 2, 4, [1, 0])
    else:
        copy_values: gl.constexpr = copy_words
        value_memory: gl.constexpr = row_memory

    tiles_r: gl.constexpr = WIDTH // ROWS
    tiles_p: gl.constexpr = (P + BP - 1) // BP
    program = gl.program_id(0)
    result = (program // (tiles_r * tiles_p)).to(gl.int64)
    example = result // SPLITS
    first_step = (result % SPLITS).to(gl.int32) * most_steps
    steps = gl.minimum(all_steps - first_step, most_steps)
    program = program % (tiles_r * tiles_p)
    # Groups of tiles along P; within one, all of its tiles of the same rows come first.
    first = program // (GROUP * tiles_r) * GROUP
    among = gl.minimum(tiles_p - first, GROUP)
    tile_p = first + program % (GROUP * tiles_r) % among
    tile_r = program % (GROUP * tiles_r) // among
    row = tile_r * ROWS
    column = tile_p.to(gl.int64) * BP

    words = values.to(gl.pointer_type(gl.int32), bitcast=True) + first_step * step_words
    words += (example if VALUES > 1 else 0) * (R * row_words)
    value_r = gl.arange(0, ROWS, gl.SliceLayout(1, copy_values))
    value_c = gl.arange(0, step_words, gl.SliceLayout(0, copy_values))
    values_at = ()
    for part in gl.static_range(PARTS):
        start = words + (row + part * WIDTH).to(gl.int64) * row_words
        values_at += (start + (value_r[:, None] * row_words + value_c[None, :]),)
    metadata_at = ()
    if is_sparse:
        codes = metadata.to(gl.pointer_type(gl.int32), bitcast=True) + first_step * 128
        codes += (example if VALUES > 1 else 0) * (R * all_steps * 2)
        strip = gl.arange(0, STRIPS, gl.SliceLayout(1, copy_words))
        lane = gl.arange(0, 32, gl.SliceLayout(0, copy_words))
        for part in gl.static_range(PARTS):
            start = codes + ((row + part * WIDTH) // 64).to(gl.int64) * (all_steps * 128)
            offset = strip // 4 * (all_steps * 128) + strip % 4 * 32
            metadata_at += (start + (offset[:, None] + lane[None, :]),)
    if TURNED:
        copy_dense: gl.constexpr = gl.BlockedLayout(
            [1, _NUMBERS], [max(1, 256 // BP), min(32, BP // 8)], [warps, 1], [1, 0]
        )
        dense_c = gl.arange(0, _DEPTH, gl.SliceLayout(1, copy_dense))
        dense_p = gl.arange(0, BP, gl.SliceLayout(0, copy_dense))
        start = dense + (example if DENSE > 1 else 0) * (C * P) + column
        start += first_step.to(gl.int64) * (_DEPTH * P)
        dense_at = start + (dense_c[:, None] * P + dense_p[None, :])
        dense_shape: gl.constexpr = [STAGES, _DEPTH, BP]
        dense_memory: gl.constexpr = gl.SwizzledSharedLayout(_NUMBERS, 1, 8, [1, 0])
        right_layout: gl.constexpr = gl.DotOperandLayout(1, sums_layout, 2)
        dense_type: gl.constexpr = dtype
    else:
        dense_r = gl.arange(0, BP, gl.SliceLayout(1, copy_words))
        dense_c = gl.arange(0, _DEPTH // 2, gl.SliceLayout(0, copy_words))
        # Behind the last column there is none: the last is read again, and not written.
        dense_r = gl.minimum(dense_r, (P - 1 - column).to(gl.int32))
        start = dense.to(gl.pointer_type(gl.int32), bitcast=True) + first_step * (_DEPTH // 2)
        start += ((example if DENSE > 1 else 0) * P + column) * (C // 2)
        dense_at = start + (dense_r[:, None] * (C // 2) + dense_c[None, :])
        dense_shape: gl.constexpr = [STAGES, BP, _DEPTH // 2]
        dense_memory: gl.constexpr = row_memory
        right_layout: gl.constexpr = gl.DotOperandLayout(1, sums_layout, 1)
        dense_type: gl.constexpr = gl.int32

    values_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * PARTS, ROWS, step_words], value_memory
    )
    metadata_ring = ()
    if is_sparse:
        metadata_ring = gl.allocate_shared_memory(
            gl.int32, [STAGES * PARTS, STRIPS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
    dense_ring = gl.allocate_shared_memory(dense_type, dense_shape, dense_memory)

    for step in gl.static_range(STAGES - 1):
        # A group for each step, if need be an empty one, so that waits may count them.
        if step < steps:
            _copy_step(
                step, step, values_at, metadata_at, dense_at, values_ring, metadata_ring,
                dense_ring, P, PARTS, TURNED, is_sparse,
            )  # fmt: skip
        async_copy.commit_group()
    sums = ()
    for _ in gl.static_range(PARTS):
        sums += (gl.zeros([ROWS, BP], gl.float32, sums_layout),)
    for step in range(steps):
        gl.inline_asm(write_wait(STAGES - 2), "~{memory}")
        gl.barrier()
        ahead = step + STAGES - 1
        if ahead < steps:
            _copy_step(
                ahead, ahead % STAGES, values_at, metadata_at, dense_at, values_ring,
                metadata_ring, dense_ring, P, PARTS, TURNED, is_sparse,
            )  # fmt: skip
        async_copy.commit_group()
        slot = step % STAGES
        if TURNED:
            b = dense_ring.index(slot).load(right_layout)
        else:
            b = dense_ring.index(slot).permute((1, 0)).load(right_layout)
        right: gl.constexpr = "h" if TURNED else "r"
        added = ()
        for part in gl.static_range(PARTS):
            a = values_ring.index(slot * PARTS + part).load(left_layout)
            if is_sparse:
                e = metadata_ring.index(slot * PARTS + part).load(word_layout)
                z = gl.inline_asm(
                    write, ("=&f", "f", "r", right, "r"), [sums[part], a, b, e], sums[part].type,
                    is_pure=True,
                )  # fmt: skip
            else:
                z = gl.inline_asm(
                    write, ("=&f", "f", "r", right), [sums[part], a, b], sums[part].type,
                    is_pure=True,
                )  # fmt: skip
            added += (z,)
        sums = added

    halves = ()
    for part in gl.static_range(PARTS):
        halves += (_halve(sums[part]),)
    # Half of the columns at a time, so that results need fewer registers beside the sums.
    for half in gl.static_range(2):
        chosen = ()
        for part in gl.static_range(PARTS):
            chosen += (halves[part][half],)
        _finish(
            chosen, bias if bias is None else bias + (example if BIAS > 1 else 0) * R,
            inputs if inputs is None else inputs + example * P * R, out + result * P * WIDTH, row,
            column + half * (BP // 2), R, P, PARTS, ACTIVATION, warps,
        )  # fmt: skip
