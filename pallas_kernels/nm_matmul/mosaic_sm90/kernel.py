"""Sparse times dense on Hopper: one kernel for y = x w, dx = dy w^T and dw = x^T dy.

Only the left operand of the tensor cores may be sparse. Each product is computed transposed,

  out[P, R] = (A[R, C] B[C, P])^T,  A 2:4 sparse along C

with A = w^T, w or dy^T, and turned while it is written: the eight-by-eight stores of Hopper
(`stmatrix`) transpose for nothing. So activations, gradients and weights all stay row-major, and no
product, activation or gate ever reads along the wrong axis.

Three warpgroups a program: two that multiply, 64 or 128 rows of A each, and one that copies tiles
of A's values and metadata and of B ahead of them into a ring. Programs stay: each takes every
`num_programs`-th tile of the output, and the ring runs on while a tile is written.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_call import call_mosaic
from pallas_kernels.nm_matmul.activations import gelu_with_slope, silu_with_slope
from pallas_kernels.nm_matmul.mosaic_sm90.wgmma_sp import (
    finish_multiply_add,
    start_multiply_add,
    zero_sums,
)
from pallas_kernels.nm_matmul.packing import TILE, Compressed

_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
NUM_COMPUTE = 2
SHARED_MEMORY_BYTES = 232_448
# Registers per thread, of 65536 for 384 threads: a copying thread needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24
# Barriers, and what Mosaic itself reserves.
_SPARE_BYTES = 4096
_STORE_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      blocks: int, 1 or 2, blocks of 64 rows that each computing warpgroup holds.
      columns: int, columns of the dense operand in a tile: a multiple of 32, at most 256 / blocks.
      contraction: int, 64 or 128, how much of C a step takes.
      stages: int, steps that the ring holds.
      group: int, tiles of P that are taken together before the next tile of R, for the cache.
      in_flight: int, 0 or 1, steps whose instructions may run on while the next is started. With 0
        every step waits for its own, which is expected to be slower and leaves least to go wrong.

    Raises:
      ValueError: if `in_flight` is neither, or the ring has no slot beside those in flight.
    """

    blocks: int
    columns: int
    contraction: int
    stages: int
    group: int = 8
    in_flight: int = 1

    def __post_init__(self):
        if self.in_flight not in (0, 1) or self.stages <= self.in_flight:
            raise ValueError(
                "in_flight must be 0 or 1 and smaller than stages, "
                f"got in_flight={self.in_flight}, stages={self.stages}"
            )

    @property
    def rows(self) -> int:
        """Rows of the sparse operand in a tile."""
        return NUM_COMPUTE * self.blocks * TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Static facts of one product.

    Attributes:
      rows: int, R.
      contraction: int, C.
      columns: int, P.
      dtype: str, of operands and result.
      dense_is_transposed: bool, B is given as [P, C], not [C, P].
      has_bias: bool, a bias is added to each row of A, a column of the result.
      activation: str or None; of a gated one, R holds values and then gates, and the result has
        R/2 columns.
      keeps_inputs: bool, what the activation was applied to is returned as well.
    """

    rows: int
    contraction: int
    columns: int
    dtype: str
    dense_is_transposed: bool
    has_bias: bool = False
    activation: str | None = None
    keeps_inputs: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether half of the rows gate the other half."""
        return self.activation in ("geglu", "swiglu")

    @property
    def out_columns(self) -> int:
        """Columns of the result."""
        return self.rows // 2 if self.is_gated else self.rows


def count_shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """Return the shared memory that a program takes."""
    values = tiles.rows * tiles.contraction
    metadata = tiles.rows * tiles.contraction // 8
    dense = 2 * tiles.columns * tiles.contraction
    stores = 2 * NUM_COMPUTE * _STORE_SLOTS * _store_columns(tiles) * TILE
    bias = 2 * tiles.rows * problem.has_bias
    return tiles.stages * (values + metadata + dense) + stores + bias + _SPARE_BYTES


def multiply_sparse(
    sparse: Compressed,
    dense: jax.Array,
    bias: jax.Array | None,
    problem: Problem,
    tiles: Tiles,
    *,
    num_programs: int,
) -> list[jax.Array]:
    """Launch the kernel.

    Args:
      sparse: Compressed [R, C].
      dense: bf16 or f16[P, C] if `problem.dense_is_transposed`, else [C, P].
      bias: [R] or None.
      tiles: Tiles; `columns` divides P and `contraction` divides C.
      num_programs: int, as many as the GPU has processors.

    Returns:
      list of the result, [P, R] or [P, R/2], and what the activation was applied to, [P, R], if
      `problem.keeps_inputs`.
    """
    blocks, columns, contraction = tiles.blocks, tiles.columns, tiles.contraction
    half = contraction // 2
    num_steps = problem.contraction // contraction
    # Rows of one block of both warpgroups lie together; those of a gate half of R further on.
    stride = problem.rows // 2 if problem.is_gated else NUM_COMPUTE * TILE
    rows_of_tile = tiles.rows // 2 if problem.is_gated else tiles.rows
    num_row_tiles = pl.cdiv(problem.out_columns, rows_of_tile)
    num_column_tiles = problem.columns // columns
    num_tiles = num_row_tiles * num_column_tiles
    # A tile that reaches over the end is copied in halves, each from where there is something.
    chunk = NUM_COMPUTE * TILE if stride % (NUM_COMPUTE * TILE) == 0 == problem.rows % 128 else TILE
    store_columns = _store_columns(tiles)
    # Waits count what was stored. In a last tile only some of the blocks may be.
    all_or_none = problem.is_gated or blocks == 1 or problem.rows % tiles.rows == 0
    outstanding = _STORE_SLOTS - 1 if all_or_none else 0
    dtype = jnp.dtype(problem.dtype)
    values_transforms = _transforms(contraction // 2)
    dense_shape = (columns, contraction) if problem.dense_is_transposed else (contraction, columns)
    dense_transforms = _transforms(dense_shape[1])

    def locate(tile):
        """Return the first row and column of a tile."""
        row, column = plgpu.planar_snake(tile, (num_row_tiles, num_column_tiles), 1, tiles.group)
        return row * rows_of_tile, column * columns

    def for_each_tile(body: Callable[..., Any], state: Any) -> Any:
        """Run a body on the tiles of this program."""
        program = lax.axis_index("program")
        count = lax.div(num_tiles - program + num_programs - 1, num_programs)
        return lax.fori_loop(
            0, count, lambda i, state: body(locate(program + i * num_programs), state), state
        )

    def kernel(*refs):
        names = ["values", "metadata", "dense"] + ["bias"] * problem.has_bias
        gmem = dict(zip(names, refs, strict=False))
        outs = refs[len(names) : -len(scratch)]
        smem = dict(zip(scratch, refs[-len(scratch) :], strict=True))
        warpgroup = lax.axis_index("warpgroup")

        def find_slot(used):
            # Not a constant for 0: then the addresses of all slots would be, and cost registers.
            return lax.rem(lax.axis_index("program") + used, jnp.int32(tiles.stages))

        def copy_step(step, used, *, row, column):
            slot = find_slot(used)

            @pl.when(used >= tiles.stages)
            def _():
                plgpu.barrier_wait(smem["free"].at[slot])

            at = pl.ds(pl.multiple_of(step * half, half), half)
            words = pl.ds(step * (contraction // TILE), contraction // TILE)
            full = smem["full"].at[slot]
            for part in range(tiles.rows // chunk):
                block, inner = divmod(part * chunk, NUM_COMPUTE * TILE)
                start = jnp.minimum(row + block * stride + inner, problem.rows - chunk)
                start = pl.multiple_of(start, TILE)
                plgpu.copy_gmem_to_smem(
                    gmem["values"].at[pl.ds(start, chunk), at],
                    smem["values"].at[slot, pl.ds(part * chunk, chunk)],
                    full,
                )
                plgpu.copy_gmem_to_smem(
                    gmem["metadata"].at[pl.ds(lax.div(start, TILE), chunk // TILE), words],
                    smem["metadata"].at[slot, pl.ds(part * (chunk // TILE), chunk // TILE)],
                    full,
                )
            across = pl.ds(pl.multiple_of(column, columns), columns)
            along = pl.ds(pl.multiple_of(step * contraction, contraction), contraction)
            index = (across, along) if problem.dense_is_transposed else (along, across)
            plgpu.copy_gmem_to_smem(gmem["dense"].at[index], smem["dense"].at[slot], full)
            return used + 1

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_tile(place, used):
                row, column = place
                return lax.fori_loop(
                    0, num_steps, lambda *x: copy_step(*x, row=row, column=column), used
                )

            used = for_each_tile(copy_tile, jnp.int32(0))

            def drain(i, _):
                plgpu.barrier_wait(smem["free"].at[find_slot(i)])

            # So that no barrier is left with an arrival nobody waited for.
            lax.fori_loop(jnp.maximum(used - tiles.stages, 0), used, drain, None)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            own = [block * NUM_COMPUTE + warpgroup for block in range(blocks)]

            def multiply_step(accs, slot, *, is_first):
                plgpu.barrier_wait(smem["full"].at[slot])
                accs = start_multiply_add(
                    accs,
                    [smem["values"].at[slot, pl.ds(block * TILE, TILE)] for block in own],
                    [smem["metadata"].at[slot, block] for block in own],
                    smem["dense"].at[slot],
                    values_transforms=values_transforms,
                    dense_transforms=dense_transforms,
                    dense_is_transposed=problem.dense_is_transposed,
                )
                plgpu.wgmma_wait(tiles.in_flight)
                # What is in flight still reads its slot; the step before is done.
                finished = _before(slot, tiles.stages) if tiles.in_flight else slot

                @pl.when(jnp.logical_not(is_first) if tiles.in_flight else True)
                def _():
                    plgpu.barrier_arrive(smem["free"].at[finished])

                return accs, _after(slot, tiles.stages)

            def multiply_turn(turn, state):
                for step in range(_steps_of_turn(tiles)):
                    state = multiply_step(*state, is_first=(turn == 0) & (step == 0))
                return state

            def multiply_all(accs, slot):
                num_turns, rest = divmod(num_steps, _steps_of_turn(tiles))
                state = lax.fori_loop(0, num_turns, multiply_turn, (accs, slot))
                for step in range(rest):
                    state = multiply_step(*state, is_first=num_turns == 0 and step == 0)
                return state

            def compute_tile(place, slot):
                row, column = place
                starts = [
                    pl.multiple_of(row + block * stride + warpgroup * TILE, TILE)
                    for block in range(blocks)
                ]
                if problem.has_bias:
                    for block, start in enumerate(starts):
                        plgpu.copy_gmem_to_smem(
                            gmem["bias"].at[pl.ds(jnp.minimum(start, problem.rows - TILE), TILE)],
                            smem["bias"].at[warpgroup, block],
                            smem["bias_full"].at[warpgroup],
                        )
                accs, slot = multiply_all(zero_sums((TILE, columns), blocks), slot)
                accs = finish_multiply_add(accs)
                if tiles.in_flight:
                    plgpu.barrier_arrive(smem["free"].at[_before(slot, tiles.stages)])
                biases = [None] * blocks
                if problem.has_bias:
                    plgpu.barrier_wait(smem["bias_full"].at[warpgroup])
                    biases = [
                        plgpu.load(smem["bias"].at[warpgroup, block], layout=_BY_ROW)
                        for block in range(blocks)
                    ]
                # The last tile may still be on its way out of the staging memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                num_stores = 0
                for first in range(0, columns, store_columns):
                    # Part by part, so that few values besides the sums are live.
                    parts = [
                        _add_bias(acc[:, first : first + store_columns], bias)
                        for acc, bias in zip(accs, biases, strict=True)
                    ]
                    results = [(outs[0], x, b) for b, x in enumerate(_activate(parts, problem))]
                    if problem.keeps_inputs:
                        results += [(outs[1], x, b) for b, x in enumerate(parts)]
                    for out_gmem, result, block in results:
                        start = starts[block]
                        staging = smem["staging"].at[warpgroup, num_stores % _STORE_SLOTS]
                        plgpu.wait_smem_to_gmem(outstanding, wait_read_only=True)
                        staging.T[...] = result.astype(dtype)
                        plgpu.commit_smem()

                        # A gate is there where its value is.
                        inside = starts[0 if problem.is_gated else block] < problem.out_columns

                        @pl.when(inside)
                        def _(staging=staging, out_gmem=out_gmem, start=start, first=first):
                            target = out_gmem.at[
                                pl.ds(column + first, store_columns), pl.ds(start, TILE)
                            ]
                            plgpu.copy_smem_to_gmem(staging, target)

                        num_stores += 1
                return slot

            for_each_tile(compute_tile, find_slot(jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

    stages = tiles.stages
    parts = tiles.rows // chunk
    scratch = {
        "values": _matrix_smem((stages, tiles.rows, contraction // 2), dtype),
        "metadata": plgpu.SMEM(
            (stages, tiles.rows // TILE, contraction // TILE, 2 * TILE), jnp.uint32
        ),
        "dense": _matrix_smem((stages, *dense_shape), dtype),
        "staging": _matrix_smem((NUM_COMPUTE, _STORE_SLOTS, store_columns, TILE), dtype),
        "full": plgpu.Barrier(num_arrivals=2 * parts + 1, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
    }
    operands = [*sparse, dense]
    if bias is not None:
        operands.append(bias)
        scratch["bias"] = plgpu.SMEM((NUM_COMPUTE, blocks, TILE), dtype)
        scratch["bias_full"] = plgpu.Barrier(num_arrivals=blocks, num_barriers=NUM_COMPUTE)
    out_type = [jax.ShapeDtypeStruct((problem.columns, problem.out_columns), dtype)]
    if problem.keeps_inputs:
        out_type.append(jax.ShapeDtypeStruct((problem.columns, problem.rows), dtype))
    kernel.__name__ = "nm_matmul"
    return call_mosaic(
        kernel,
        *operands,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(min(num_programs, num_tiles),),
        grid_names=("program",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _store_columns(tiles: Tiles) -> int:
    return TILE if tiles.columns % TILE == 0 else TILE // 2


def _steps_of_turn(tiles: Tiles) -> int:
    # Each step has registers of its own for metadata while others are in flight.
    return 1 + tiles.in_flight


def _after(slot, stages):
    # Not a remainder, which costs registers.
    return jnp.where(slot == stages - 1, 0, slot + 1)


def _before(slot, stages):
    return jnp.where(slot == 0, stages - 1, slot - 1)


def _activate(parts: list[jax.Array], problem: Problem) -> list[jax.Array]:
    if problem.activation is None:
        return parts
    if not problem.is_gated:
        return [gelu_with_slope(part)[0] for part in parts]
    value, gate = parts
    act = silu_with_slope if problem.activation == "swiglu" else gelu_with_slope
    return [value * act(gate)[0]]


def _add_bias(part: jax.Array, bias: jax.Array | None) -> jax.Array:
    if bias is None:
        return part
    return part + lax.broadcast_in_dim(bias.astype(jnp.float32), part.shape, [0])


def _transforms(row: int) -> tuple[Any, ...]:
    """Tiling and swizzle of 16-bit matrices with rows of some length, for the tensor cores."""
    swizzle = next(size for size in (128, 64, 32) if 2 * row % size == 0)
    # Type checkers take both classes for abstract.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // 2)), swizzling(swizzle)


def _matrix_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1]))
