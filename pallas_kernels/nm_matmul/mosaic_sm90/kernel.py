"""Sparse times dense on Hopper: one kernel for y = x w, dx = dy w^T and dw = x^T dy.

Only the left operand of the tensor cores may be sparse. Each product is computed transposed,

  out[P, R] = (A[R, C] B[C, P])^T,  A 2:4 sparse along C

with A = w^T, w or dy^T, and turned while it is written: the eight-by-eight stores of Hopper
(`stmatrix`) transpose for nothing. So activations, gradients and weights all stay row-major, and no
product, activation or gate ever reads along the wrong axis.

Programs are those of `pallas_kernels.hopper`, and stay. The two computing warpgroups multiply 64 or
128 rows of A each; a step copies a tile of A's values and metadata and one of B.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.budget import NUM_COMPUTE
from pallas_kernels.hopper.launch import CLUSTER, for_each_tile, launch_kernel
from pallas_kernels.hopper.layouts import BY_ROW
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem, matrix_transforms
from pallas_kernels.nm_matmul.activations import gelu_with_slope, silu_with_slope
from pallas_kernels.nm_matmul.mosaic_sm90.cut import STORE_SLOTS, Cut, Place, Problem, Tiles
from pallas_kernels.nm_matmul.mosaic_sm90.wgmma_sp import (
    finish_multiply_add,
    start_multiply_add,
    zero_sums,
)
from pallas_kernels.nm_matmul.packing import TILE, Compressed


class _Operands(NamedTuple):
    """What the kernel reads: arrays, and in it references to global memory."""

    sparse: Any
    dense: Any
    bias: Any


class _Scratch(NamedTuple):
    """Shared memory: scratch types, and in the kernel references.

    Attributes:
      ring: see `describe_ring`; values, metadata and the dense operand.
      staging: [2, slots, columns, 64], parts of the result of each warpgroup.
      bias: [2, blocks, 64] or None.
      bias_full: barriers, [2], or None.
    """

    ring: Any
    staging: Any
    bias: Any
    bias_full: Any


class _Program(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
      operands: _Operands in global memory.
      outs: references to the results in global memory.
      scratch: _Scratch.
      num_clusters: int, that share the tiles.
    """

    cut: Cut
    operands: _Operands
    outs: Sequence[Any]
    scratch: _Scratch
    ring: Ring
    num_clusters: int

    def for_each_tile(self, body: Callable[[Place, Any], Any], state: Any) -> Any:
        """Run a body on the tiles of this program."""
        cut = self.cut
        rank = lax.axis_index(CLUSTER) if cut.tiles.cluster > 1 else 0
        return for_each_tile(
            lambda tile, state: body(cut.locate(tile, rank), state),
            state,
            num_tiles=cut.num_shared_tiles,
            num_programs=self.num_clusters,
        )


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
      num_programs: int, as many as the GPU has processors; a multiple of `tiles.cluster`.

    Returns:
      list of the result, [P, R] or [P, R/2], and what the activation was applied to, [P, R], if
      `problem.keeps_inputs`.
    """
    cut = Cut(problem, tiles)
    num_clusters = min(num_programs // tiles.cluster, cut.num_shared_tiles)

    def make_program(operands, outs, scratch):
        # With two slots and two steps a turn, a ring that began with its first slot would have
        # constants for addresses, which cost registers through the whole program.
        shared = ["dense"] if tiles.cluster > 1 else []
        ring = Ring(*scratch.ring, stages=tiles.stages, is_staggered=True, shared=shared)
        program = _Program(cut, operands, outs, scratch, ring, num_clusters)
        return lambda: _copy(program), lambda warpgroup: _compute(program, warpgroup)

    widths = [problem.out_columns] + [problem.rows] * problem.keeps_inputs
    return launch_kernel(
        make_program,
        _Operands(sparse, dense, bias),
        out_type=[jax.ShapeDtypeStruct((problem.columns, n), problem.dtype) for n in widths],
        scratch=_describe_scratch(cut),
        num_programs=num_clusters,
        name="nm_matmul",
        cluster=tiles.cluster,
        approx_math=True,
    )


def _describe_scratch(cut: Cut) -> _Scratch:
    problem, tiles = cut.problem, cut.tiles
    dtype, stages = jnp.dtype(problem.dtype), tiles.stages
    columns, contraction = tiles.columns, tiles.contraction
    dense = (columns, contraction) if problem.dense_is_transposed else (contraction, columns)
    words = (tiles.rows // TILE, contraction // TILE, 2 * TILE)
    smem = {
        "values": matrix_smem((stages, tiles.rows, contraction // 2), dtype),
        "metadata": plgpu.SMEM((stages, *words), jnp.uint32),
        "dense": matrix_smem((stages, *dense), dtype),
    }
    bias = bias_full = None
    if problem.has_bias:
        bias = plgpu.SMEM((NUM_COMPUTE, tiles.blocks, TILE), dtype)
        bias_full = plgpu.Barrier(num_arrivals=tiles.blocks, num_barriers=NUM_COMPUTE)
    return _Scratch(
        ring=describe_ring(
            smem, copies=2 * cut.num_chunks + 1, readers=NUM_COMPUTE, cluster=tiles.cluster
        ),
        staging=matrix_smem((NUM_COMPUTE, STORE_SLOTS, tiles.store_columns, TILE), dtype),
        bias=bias,
        bias_full=bias_full,
    )


def _copy(program: _Program) -> None:
    """Copy the operands of all tiles of a program."""
    cut = program.cut

    def copy_tile(place, used):
        return lax.fori_loop(
            0, cut.num_steps, lambda step, used: _copy_step(program, place, step, used), used
        )

    used = program.for_each_tile(copy_tile, jnp.int32(0))
    program.ring.drain(used)


def _copy_step(program: _Program, place: Place, step: Any, used: Any) -> Any:
    """Copy the operands of one step of a tile, after `used` steps; return how many were used."""
    cut, ring, (sparse, dense, _) = program.cut, program.ring, program.operands
    columns, contraction = cut.tiles.columns, cut.tiles.contraction
    half, words = contraction // 2, contraction // TILE
    slot = ring.claim(used)
    at = pl.ds(pl.multiple_of(step * half, half), half)
    words_at = pl.ds(step * words, words)
    for part in range(cut.num_chunks):
        in_slot = pl.ds(part * cut.chunk, cut.chunk)
        blocks_in_slot = pl.ds(part * (cut.chunk // TILE), cut.chunk // TILE)
        block, inner = divmod(part * cut.chunk, NUM_COMPUTE * TILE)
        start = place.row + block * cut.stride + inner
        start = pl.multiple_of(jnp.minimum(start, cut.problem.rows - cut.chunk), TILE)
        ring.copy(sparse.values.at[pl.ds(start, cut.chunk), at], "values", slot, in_slot)
        blocks = pl.ds(lax.div(start, TILE), cut.chunk // TILE)
        ring.copy(sparse.metadata.at[blocks, words_at], "metadata", slot, blocks_in_slot)
    across = pl.ds(pl.multiple_of(place.column, columns), columns)
    along = pl.ds(pl.multiple_of(step * contraction, contraction), contraction)
    index = (across, along) if cut.problem.dense_is_transposed else (along, across)
    ring.copy(dense.at[index], "dense", slot)
    return used + 1


def _compute(program: _Program, warpgroup: Any) -> None:
    """Compute a warpgroup's rows of all tiles of a program."""
    cut = program.cut
    own = [block * NUM_COMPUTE + warpgroup for block in range(cut.tiles.blocks)]

    def compute_tile(place, slot):
        starts = [
            pl.multiple_of(place.row + block * cut.stride + warpgroup * TILE, TILE)
            for block in range(cut.tiles.blocks)
        ]
        _copy_bias(program, warpgroup, starts)
        accs, slot = _multiply_tile(program, own, slot)
        biases = _load_bias(program, warpgroup)
        _write_tile(program, warpgroup, place, starts, accs, biases)
        return slot

    program.for_each_tile(compute_tile, program.ring.find_slot(jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _multiply_tile(
    program: _Program, own: Sequence[Any], slot: Any
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Sum all steps of a tile for some of its blocks; return the sums and the next tile's slot."""
    cut, tiles, ring = program.cut, program.cut.tiles, program.ring
    num_turns, rest = divmod(cut.num_steps, _steps_of_turn(tiles))

    def multiply_turn(turn: Any, state: Any) -> Any:
        for step in range(_steps_of_turn(tiles)):
            is_first = (turn == 0) & (step == 0)
            state = _multiply_step(program, own, *state, is_first=is_first)
        return state

    state: Any = zero_sums((TILE, tiles.columns), tiles.blocks), slot
    state = lax.fori_loop(0, num_turns, multiply_turn, state)
    for step in range(rest):
        is_first = num_turns == 0 and step == 0
        state = _multiply_step(program, own, *state, is_first=is_first)
    accs, slot = state
    accs = finish_multiply_add(accs)
    if tiles.in_flight:
        ring.give_back(ring.previous_slot(slot))
    return accs, slot


def _steps_of_turn(tiles: Tiles) -> int:
    # Each step has registers of its own for metadata while others are in flight.
    return 1 + tiles.in_flight


def _multiply_step(
    program: _Program, own: Sequence[Any], accs: Sequence[jax.Array], slot: Any, *, is_first: Any
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Start the products of one step; return the sums in flight and the next slot."""
    cut, tiles, ring = program.cut, program.cut.tiles, program.ring
    dtype = cut.problem.dtype
    tile = ring.wait(slot)
    accs = start_multiply_add(
        accs,
        [tile["values"].at[pl.ds(block * TILE, TILE)] for block in own],
        [tile["metadata"].at[block] for block in own],
        tile["dense"],
        values_transforms=matrix_transforms(tiles.contraction // 2, dtype),
        dense_transforms=matrix_transforms(tile["dense"].shape[-1], dtype),
        dense_is_transposed=cut.problem.dense_is_transposed,
    )
    plgpu.wgmma_wait(tiles.in_flight)
    # What is in flight still reads its slot; the step before is done.
    finished = ring.previous_slot(slot) if tiles.in_flight else slot

    @pl.when(jnp.logical_not(is_first) if tiles.in_flight else True)
    def _():
        ring.give_back(finished)

    return accs, ring.next_slot(slot)


def _copy_bias(program: _Program, warpgroup: Any, starts: Sequence[Any]) -> None:
    """Start to copy the bias of a warpgroup's rows, if there is one."""
    scratch, bias = program.scratch, program.operands.bias
    if bias is None:
        return
    for block, start in enumerate(starts):
        start = jnp.minimum(start, program.cut.problem.rows - TILE)
        plgpu.copy_gmem_to_smem(
            bias.at[pl.ds(start, TILE)],
            scratch.bias.at[warpgroup, block],
            scratch.bias_full.at[warpgroup],
        )


def _load_bias(program: _Program, warpgroup: Any) -> list[jax.Array | None]:
    """Wait for the bias of a warpgroup's rows; return it for each block, or None."""
    scratch, blocks = program.scratch, program.cut.tiles.blocks
    if scratch.bias is None:
        return [None] * blocks
    plgpu.barrier_wait(scratch.bias_full.at[warpgroup])
    return [plgpu.load(scratch.bias.at[warpgroup, block], layout=BY_ROW) for block in range(blocks)]


def _write_tile(
    program: _Program,
    warpgroup: Any,
    place: Place,
    starts: Sequence[Any],
    accs: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
) -> None:
    """Finish a warpgroup's sums and start to write them, turned, to global memory."""
    cut, outs = program.cut, program.outs
    problem, store_columns = cut.problem, cut.tiles.store_columns
    # The last tile may still be on its way out of the staging memory.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    num_stores = 0
    # Part by part, so that few values besides the sums are live; a gate with its value.
    every = range(len(accs))
    together = [every] if problem.is_gated else [[block] for block in every]
    for first, blocks in itertools.product(range(0, cut.tiles.columns, store_columns), together):
        parts = [
            _add_bias(accs[block][:, first : first + store_columns], biases[block])
            for block in blocks
        ]
        # Of a value and its gate one result is left, which goes where the value lies.
        results = [(outs[0], x, b) for x, b in zip(_activate(parts, problem), blocks, strict=False)]
        if problem.keeps_inputs:
            results += [(outs[1], x, b) for x, b in zip(parts, blocks, strict=True)]
        for out_gmem, result, block in results:
            staging = program.scratch.staging.at[warpgroup, num_stores % STORE_SLOTS]
            plgpu.wait_smem_to_gmem(cut.most_stores, wait_read_only=True)
            staging.T[...] = result.astype(problem.dtype)
            plgpu.commit_smem()
            # A gate is there where its value is.
            inside = starts[0 if problem.is_gated else block] < problem.out_columns

            @pl.when(inside)
            def _(staging=staging, out_gmem=out_gmem, start=starts[block], first=first):
                columns = pl.ds(place.column + first, store_columns)
                plgpu.copy_smem_to_gmem(staging, out_gmem.at[columns, pl.ds(start, TILE)])

            num_stores += 1


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
