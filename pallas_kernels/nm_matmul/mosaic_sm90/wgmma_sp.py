"""Hopper's sparse tensor-core instruction, `wgmma.mma_async.sp`, from Pallas.

One instruction multiplies 64 rows of a 2:4 sparse matrix, 32 columns wide and 16 values as stored,
with a dense matrix of 32 rows: D[64, P] += A[64, 32] B[32, P], for P up to 256. Pallas has no
operation for it, so that it is written as inline PTX, in the way Mosaic writes the dense one. JAX's
interpreter cannot run that; the tests teach it to (`tests/kernels/sparse_products.py`).

*Registers in flight.* The instruction is asynchronous, and besides shared memory it reads a
register: the metadata of its thread. The register must hold them until the group of instructions
has been waited for. In PTX each call of `start_multiply_add` has registers of its own, so a loop
that starts a group while another is in flight has to contain a call for each of the two. Nothing in
PTX tells ptxas to keep them apart across turns of the loop (an empty instruction after the wait
leaves no trace there); it has done so in every cut of the kernel that is compiled in the tests,
which look for it (`products_in_flight`).

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

from pallas_kernels.nm_matmul.packing import TILE

# How a sum lies in registers: one value in each, which LLVM leaves alone between instructions.
ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT  # noqa: SLF001

# Type checkers take the decorated function for one that still wants the launch context.
_inline: Any = plgpu.inline_mgpu

_STEP = 32  # columns of the sparse operand that one instruction covers


def zero_sums(shape: tuple[int, int], count: int) -> tuple[jax.Array, ...]:
    """Make sums to start from.

    Args:
      shape: (64, P).
      count: int, how many.

    Returns:
      tuple of f32[64, P] laid out as ACCUMULATOR.
    """

    @_inline(return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACCUMULATOR))
    def make(_):
        zero = utils.c(0.0, ir.F32Type.get())
        return fa.FragmentedArray.splat(zero, shape, fa.WGMMA_LAYOUT_ACC_32BIT)

    return tuple(make() for _ in range(count))


def start_multiply_add(
    accs: Sequence[jax.Array],
    values_smem: Sequence[Any],
    metadata_smem: Sequence[Any],
    dense_smem: Any,
    *,
    values_transforms: tuple[Any, ...],
    dense_transforms: tuple[Any, ...],
    dense_is_transposed: bool,
) -> tuple[jax.Array, ...]:
    """Start D += A B for blocks of 64 rows, as one group of asynchronous instructions.

    Until `plgpu.wgmma_wait` has waited for the group, nothing else may touch the sums, overwrite
    the operands or run this call again.

    Args:
      accs: D of each block, f32[64, P] laid out as ACCUMULATOR.
      values_smem: reference [64, C/2] of each block.
      metadata_smem: reference uint32[C/64, 128] of each block.
      dense_smem: reference [P, C] if transposed, else [C, P].
      values_transforms: tiling and swizzle of the references to values.
      dense_transforms: tiling and swizzle of the dense reference.

    Returns:
      tuple of new D.
    """
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=ACCUMULATOR) for x in accs)
    every = range(len(accs))

    @_inline(
        arg_types=(
            tuple(ACCUMULATOR for _ in every),
            tuple(plgpu.RefType(values_transforms) for _ in every),
            tuple(plgpu.RefType() for _ in every),
            plgpu.RefType(dense_transforms),
        ),
        return_type=types,
    )
    def start(_, accs, values, metadata, dense):
        if dense_is_transposed:
            dense = utils.memref_transpose(dense, (1, 0, 3, 2))
        # All words before the fence: it makes registers that were written so far visible to the
        # instructions, and a load between them splits the group (ptxas says so in C7519).
        words = _load_words(metadata)
        nvvm.wgmma_fence_aligned()
        started = tuple(map(_issue, accs, values, words, [dense] * len(accs)))
        nvvm.wgmma_commit_group_sync_aligned()
        return started

    return start(tuple(accs), tuple(values_smem), tuple(metadata_smem), dense_smem)


def finish_multiply_add(accs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Wait until all sums are complete.

    Args:
      accs: what `start_multiply_add` returned last.

    Returns:
      tuple of f32[64, P], to be used as any array.
    """
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA) for x in accs)

    @_inline(arg_types=(tuple(ACCUMULATOR for _ in accs),), return_type=types)
    def finish(_, accs):
        nvvm.wgmma_wait_group_sync_aligned(0)
        # Nothing that reads the sums may move above the wait, which does not mention them.
        return tuple(fa.optimization_barrier(acc).to_layout(fa.WGMMA_LAYOUT) for acc in accs)

    return finish(tuple(accs))


def operand_offsets(
    num_steps: int,
    *,
    values_stride: int,
    dense_stride: int,
    steps_of_tile: int,
    tile_stride: int,
) -> list[tuple[int, int]]:
    """Return where the operands of each instruction of a step start.

    Values of one block of rows lie in one tile, at most as wide as a swizzle. The dense operand has
    tiles of the contraction, each as wide.

    Args:
      num_steps: int, instructions, each of 32 columns of the sparse operand.
      values_stride: int, bytes from one instruction to the next, inside a tile.
      dense_stride: int, bytes from one instruction to the next, inside a tile.
      steps_of_tile: int, instructions that one tile of the dense operand serves.
      tile_stride: int, bytes from one tile of the dense operand to the next.

    Returns:
      list of (values, dense), bytes.
    """
    return [
        (
            step * values_stride,
            step // steps_of_tile * tile_stride + step % steps_of_tile * dense_stride,
        )
        for step in range(num_steps)
    ]


def _issue(acc, values, words, dense):
    """Issue the instructions of one block of rows; all arguments are values of the compiler."""
    (_, columns), dtype = mma_utils.tiled_memref_shape(dense)
    (_, half_contraction), _ = mma_utils.tiled_memref_shape(values)
    values_swizzle = 2 * ir.MemRefType(values.type).shape[3]
    dense_tile = ir.MemRefType(dense.type).shape
    dense_swizzle = 2 * max(dense_tile[2:])
    (values_base, (_, values_strides)), _, _ = mma_utils.create_descriptor(
        values,
        swizzle=values_swizzle,
        group_size=(TILE, half_contraction),
        logical_k_major=False,
    )
    # The dense operand is walked twice as fast: 32 rows an instruction, 64 bytes.
    contraction_tile = dense_swizzle // 2
    (dense_base, (_, dense_strides)), (_, tile_stride), fastest = mma_utils.create_descriptor(
        dense,
        swizzle=dense_swizzle,
        group_size=(contraction_tile, columns),
        logical_k_major=True,
        mma_bytewidth_k=2 * _STEP,
    )
    offsets = operand_offsets(
        2 * half_contraction // _STEP,
        values_stride=values_strides[-1],
        dense_stride=dense_strides[-1],
        steps_of_tile=contraction_tile // _STEP,
        tile_stride=tile_stride,
    )
    registers = list(acc.registers.flat)
    for step, (values_offset, dense_offset) in enumerate(offsets):
        registers = _instruction(
            registers,
            _advance(values_base, values_offset),
            _advance(dense_base, dense_offset),
            words[step // 2],
            selector=step % 2,
            columns=columns,
            dtype=str(dtype),
            dense_is_row_major=fastest is mma_utils.Dim.MN,
        )
    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(acc.registers.shape),
        _layout=acc.layout,
        _is_signed=acc.is_signed,
    )


def _load_words(metadata):
    """Load the metadata of this thread: of each block, a word for every 64 columns."""
    index = ir.IndexType.get()
    size = utils.c(utils.WARPGROUP_SIZE, ir.IntegerType.get_signless(32))
    thread = arith.index_cast(index, arith.remui(utils.thread_idx(), size))
    return [
        [
            _keep_in_place(memref.load(block, [utils.c(tile, index), thread]))
            for tile in range(ir.MemRefType(block.type).shape[0])
        ]
        for block in metadata
    ]


def _keep_in_place(word):
    """Pass a word through an empty instruction, before which it has to be loaded."""
    return llvm.inline_asm(word.type, [word], "", "=r,0", asm_dialect=0, has_side_effects=True)


def _advance(descriptor, num_bytes):
    """Move the address in an operand's descriptor."""
    offset = utils.c(mma_utils.encode_addr(num_bytes), ir.IntegerType.get_signless(64))
    return llvm.add(descriptor, offset, overflow_flags=llvm.IntegerOverflowFlags.none)


def _instruction(registers, values, dense, word, *, selector, columns, dtype, dense_is_row_major):
    """Emit one instruction; sums are tied, so that each stays in its register."""
    count = len(registers)
    sums = ", ".join(f"${i}" for i in range(count))
    values_at, dense_at, word_at = (f"${2 * count + i}" for i in range(3))
    # After the metadata: which lanes supply them, that sums are added to, the signs of A and B,
    # whether A and B lie with their contraction outside.
    ptx = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"wgmma.mma_async.sp.sync.aligned.m64n{columns}k{_STEP}.f32.{dtype}.{dtype} "
        f"{{{sums}}}, {values_at}, {dense_at}, {word_at}, {selector}, p, 1, 1, 0, "
        f"{int(dense_is_row_major)}; }}"
    )
    types = llvm.StructType.get_literal([register.type for register in registers])
    results = llvm.inline_asm(
        types,
        [*registers, values, dense, word],
        ptx,
        ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(r.type, results, [i]) for i, r in enumerate(registers)]
