"""Small kernels for tests of the PTX machine: a 2:4 product in Gluon, and a dense one in Triton.

Both have 64 rows. Programs of the sparse one have 64 columns each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.ptx_triton import compile_program

# Nothing is compiled, and no test that needs it runs, where the extra is not installed.
jax_triton = pytest.importorskip("jax_triton")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gluon = pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
async_copy = pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere.async_copy")

STAGES = 3
_OPTIONS = dict(
    compute_capability=80, backend_options={"ptx_version": 86, "enable_fp_fusion": True}
)
# Two by two warps, of 16 out of every 32 rows and 8 out of every 16 columns.
_SUMS = gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8])
# Of metadata a thread has a word for each 16 of its warp's rows.
_WORDS = gl.DistributedLinearLayout(
    reg_bases=[[0, 1]],
    lane_bases=[[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]],
    warp_bases=[[0, 0], [32, 0]],
    block_bases=[],
    shape=[64, 2],
)


@gluon.constexpr_function
def write_products(results, operands):
    """Write the instructions of a step: registers come in the order of the layouts."""
    (d,), (c, a, b, e) = results, operands
    lines = []
    for k in range(2):
        for m in range(2):
            for n in range(4):
                at = slice(16 * m + 4 * n, 16 * m + 4 * n + 4)
                parts = d[at], a[8 * m + 4 * k :][:4], b[8 * n + 4 * k :][:4], (d if k else c)[at]
                fragments = ", ".join("{" + ", ".join(part) + "}" for part in parts)
                lines.append(
                    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
                    f"{fragments}, {e[m]}, {k};"
                )
    return "\n".join(lines)


# Operands are words of 32 bits: two values along the contraction, or metadata.
@gluon.jit
def _load(
    values, dense, words, values_at, dense_at, words_at, step,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = step % STAGES
    VALUES: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    DENSE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, VALUES))[:, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, VALUES))[None, :]
    async_copy.async_load(values_at.index(slot), values + row * (K // 4) + step * 16 + column)
    row = gl.arange(0, 64, gl.SliceLayout(1, DENSE))[:, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, DENSE))[None, :]
    async_copy.async_load(dense_at.index(slot), dense + row * (K // 2) + step * 32 + column)
    row = gl.arange(0, 64, gl.SliceLayout(1, WORDS))[:, None]
    column = gl.arange(0, 2, gl.SliceLayout(0, WORDS))[None, :]
    async_copy.async_load(words_at.index(slot), words + step * 128 + row * 2 + column)


@gluon.jit
def small_product(
    values, dense, words, out, K: gl.constexpr, SUMS: gl.constexpr, WORDS: gl.constexpr,
    STAGES: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    values_at = gl.allocate_shared_memory(
        gl.int32, [STAGES, 64, 16], gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    )
    dense_at = gl.allocate_shared_memory(
        gl.int32, [STAGES, 64, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    )
    words_at = gl.allocate_shared_memory(
        gl.int32, [STAGES, 64, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    dense += gl.program_id(0) * 64 * (K // 2)
    for first in gl.static_range(STAGES - 1):
        _load(values, dense, words, values_at, dense_at, words_at, first, K, STAGES)
        async_copy.commit_group()
    sums = gl.zeros([64, 64], gl.float32, SUMS)
    for step in range(0, K // 64):
        # jax-triton 0.4.1 compiles with passes after which `wait_group` waits for all groups.
        gl.inline_asm("cp.async.wait_group 1;", "~{memory}")
        gl.barrier()
        ahead = step + STAGES - 1
        if ahead < K // 64:
            _load(values, dense, words, values_at, dense_at, words_at, ahead, K, STAGES)
        async_copy.commit_group()
        slot = (step + SHIFT) % STAGES
        a = values_at.index(slot).load(gl.DotOperandLayout(0, SUMS, 1))
        b = dense_at.index(slot).permute((1, 0)).load(gl.DotOperandLayout(1, SUMS, 1))
        e = words_at.index(slot).load(WORDS)
        sums = gl.inline_asm(
            write_products, ("=&f", "f", "r", "r", "r"), [sums, a, b, e], sums.type, is_pure=True
        )
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None]
    column = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(out + row * (gl.num_programs(0) * 64) + column, sums)


@functools.cache
def compile_product(contraction, programs, shift=0):
    """Compile the product for compute capability 8.0.

    Args:
      contraction: int, a multiple of 64.
      programs: int, blocks of 64 columns.
      shift: int, by how many slots of the ring the product reads the wrong one.

    Returns:
      TritonProgram.
    """

    def launch(values, dense, words):
        return jax_triton.triton_call(
            values, dense, words,
            kernel=small_product,
            out_type=describe_output(programs),
            grid=(programs,),
            num_warps=4,
            **_OPTIONS,
            K=contraction, SUMS=_SUMS, WORDS=_WORDS, STAGES=STAGES, SHIFT=shift,
        )  # fmt: skip

    sizes = (64, contraction // 4), (64 * programs, contraction // 2), (2 * contraction,)
    return compile_program(launch, *(jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes))


def describe_output(programs):
    """Return shape and dtype of the product."""
    return jax.ShapeDtypeStruct((64, 64 * programs), jnp.float32)


def pack(values, positions):
    """Lay a 2:4 matrix of 64 rows out as the kernel reads it.

    Args:
      values: bf16[64, K / 4, 2], what is kept of every four.
      positions: int[64, K / 4, 2], where in the four it is.

    Returns:
      tuple of int32[64, K / 4] of values and int32[2 K] of metadata.
    """
    nibbles = (positions[..., 0] | positions[..., 1] << 2).astype(np.uint32)
    steps = nibbles.shape[1] // 16
    halves = (nibbles.reshape(64, -1, 4) << 4 * np.arange(4, dtype=np.uint32)).sum(-1)
    # Of a row [32, warp, half of its 16, row of 8], and of 16 columns [step, quarter].
    halves = halves.astype(np.uint32).reshape(2, 2, 2, 8, steps, 4)
    words = halves[:, :, 0] | halves[:, :, 1] << 16
    words = words.transpose(3, 1, 2, 4, 0).reshape(-1)
    return values.reshape(64, -1).view(np.int32), words.view(np.int32)


@triton.jit
def dense_product(left, right, out, M: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    row, column = tl.arange(0, 64), tl.arange(0, 64)
    sums = tl.zeros([64, 64], tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        a = tl.load(left + row[:, None] * K + k[None, :], mask=row[:, None] < M, other=0.0)
        b = tl.load(right + k[:, None] * 64 + column[None, :])
        sums = tl.dot(a, b, sums)
    sums -= tl.max(sums, 1)[:, None]
    tl.store(out + row[:, None] * 64 + column[None, :], sums, mask=row[:, None] < M)


def compile_dense_product(rows, contraction):
    """Compile a dense product less the maximum of each row, whose copies Triton arranges.

    Args:
      rows: int, of the left operand and of the result, 64 at most.
      contraction: int, a multiple of 32.

    Returns:
      TritonProgram.
    """

    def launch(left, right):
        return jax_triton.triton_call(
            left, right,
            kernel=dense_product,
            out_type=jax.ShapeDtypeStruct((rows, 64), jnp.float32),
            grid=(1,),
            num_warps=4,
            num_stages=3,
            **_OPTIONS,
            M=rows, K=contraction, STEP=32,
        )  # fmt: skip

    sizes = (rows, contraction), (contraction, 64)
    return compile_program(launch, *(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes))
