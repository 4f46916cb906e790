"""Products with a block-sparse weight on Hopper tensor cores.

  y = x w       a tile of y, 128 tokens by one column of blocks, walks the kept blocks of its column
  dx = dy w^T   the same along rows of blocks, with blocks turned around as they are read
  dw = x^T dy   every kept block walks the tokens, every pruned one is filled with zeros

A copying warpgroup fetches tiles into a ring ahead of one or two that multiply, 64 rows each. A
list's length is read from GPU memory: a new mask is new data for the same program.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.block_schedule import make_block_schedule
from pallas_kernels.block_sparse_attention.mosaic_sm90_tiles import matrix_smem
from pallas_kernels.dispatch import check_hopper

_ROWS = 64
"""Rows of a product that a warpgroup computes."""
_SIDES = (64, 128)
_STAGES = 4
# Registers per thread: a copying thread needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40


def check(x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> None:
    """Refuse what the kernels do not do.

    Args:
      x_MK: [M, K].
      w_KN: [K, N].
      mask_IJ: bool[I, J].

    Raises:
      NotImplementedError: if the device, a type or the size of the blocks is another.
    """
    check_hopper()
    if x_MK.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"implementation='mosaic_sm90' takes bfloat16 and float16, got {x_MK.dtype}"
        )
    block = (w_KN.shape[0] // mask_IJ.shape[0], w_KN.shape[1] // mask_IJ.shape[1])
    if not all(side in _SIDES for side in block):
        raise NotImplementedError(
            f"implementation='mosaic_sm90' takes blocks with sides of {_SIDES}, got {block} for "
            f"w {list(w_KN.shape)} and mask {list(mask_IJ.shape)}"
        )


def multiply(x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the kept blocks.

    Args:
      x_MK: bf16 or f16[M, K]; filled up with zeros to a multiple of 128 rows.
      w_KN: [K, N].
      mask_IJ: bool[I, J].

    Returns:
      [M, N], typed like x.
    """
    schedule = make_block_schedule(mask_IJ)
    return _multiply_blocks(
        x_MK, w_KN, schedule.q_counts, schedule.q_indices, mask_IJ.shape, turned=False
    )


def multiply_transposed(dy_MN: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the transpose of the kept blocks.

    Args:
      dy_MN: bf16 or f16[M, N]; filled up as by `multiply`.
      w_KN: [K, N].
      mask_IJ: bool[I, J].

    Returns:
      [M, K], typed like dy.
    """
    schedule = make_block_schedule(mask_IJ)
    return _multiply_blocks(
        dy_MN, w_KN, schedule.kv_counts, schedule.kv_indices, mask_IJ.shape, turned=True
    )


def multiply_gradient(x_MK: jax.Array, dy_MN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Compute the kept blocks of x^T dy.

    Args:
      x_MK: bf16 or f16[M, K]; filled up with zeros to a multiple of 64 rows, as is dy.
      dy_MN: [M, N].
      mask_IJ: bool[I, J].

    Returns:
      [K, N], typed like x; 0 elsewhere.
    """
    x_MK, dy_MN = _pad_rows(x_MK, _ROWS), _pad_rows(dy_MN, _ROWS)
    (num_tokens, inner), columns = x_MK.shape, dy_MN.shape[1]
    rows, width = inner // mask_IJ.shape[0], columns // mask_IJ.shape[1]
    num_compute, num_steps, dtype = rows // _ROWS, num_tokens // _ROWS, x_MK.dtype
    ring = _Ring(num_steps=num_steps, num_compute=num_compute)

    def kernel(kept_gmem, x_gmem, dy_gmem, dw_gmem, x_smem, dy_smem, staging, full, free):
        i, j = lax.axis_index("i"), lax.axis_index("j")
        warpgroup = lax.axis_index("warpgroup")
        count = jnp.where(kept_gmem[i, j] != 0, num_steps, 0)

        def copy(step, slot):
            at = pl.ds(pl.multiple_of(step * _ROWS, _ROWS), _ROWS)
            for part in range(num_compute):
                start = pl.multiple_of(i * rows + part * _ROWS, _ROWS)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[at, pl.ds(start, _ROWS)], x_smem.at[slot, part], full.at[slot]
                )
            across = pl.ds(pl.multiple_of(j * width, width), width)
            plgpu.copy_gmem_to_smem(dy_gmem.at[at, across], dy_smem.at[slot], full.at[slot])

        def operands(slot):
            return x_smem.at[slot, warpgroup].transpose((1, 0)), dy_smem.at[slot]

        def store(product):
            start = pl.multiple_of(i * rows + warpgroup * _ROWS, _ROWS)
            across = pl.ds(pl.multiple_of(j * width, width), width)
            _store(product, staging.at[warpgroup], dw_gmem.at[pl.ds(start, _ROWS), across])

        ring.run(count, copy, operands, store, full=full, free=free, columns=width)

    return ring.launch(
        kernel,
        (mask_IJ.astype(jnp.int32), x_MK, dy_MN),
        grid={"i": mask_IJ.shape[0], "j": mask_IJ.shape[1]},
        matrices=[(num_compute, _ROWS, _ROWS), (_ROWS, width)],
        staging=(num_compute, _ROWS, width),
        out=jax.ShapeDtypeStruct((inner, columns), dtype),
        num_copies=num_compute + 1,
        name="block_sparse_matmul_gradient",
    )


def _multiply_blocks(x, w, counts, indices, grid, *, turned: bool) -> jax.Array:
    """Return x w, or x w^T of turned blocks, by lists of one output block each."""
    num_rows, dtype = x.shape[0], x.dtype
    side = [size // count for size, count in zip(w.shape, grid, strict=True)]
    inner, width = side[::-1] if turned else side
    num_compute = 2
    tokens = num_compute * _ROWS
    x = _pad_rows(x, tokens)
    out_width = w.shape[0 if turned else 1]
    ring = _Ring(num_steps=indices.shape[1], num_compute=num_compute)

    def kernel(counts_gmem, indices_gmem, x_gmem, w_gmem, y_gmem, x_smem, w_smem, *rest):
        staging, full, free = rest
        tile, column = lax.axis_index("tile"), lax.axis_index("column")
        warpgroup = lax.axis_index("warpgroup")

        def copy(step, slot):
            block = indices_gmem[column, step]
            at = pl.ds(pl.multiple_of(tile * tokens, tokens), tokens)
            along = pl.ds(pl.multiple_of(block * inner, inner), inner)
            across = pl.ds(pl.multiple_of(column * width, width), width)
            plgpu.copy_gmem_to_smem(x_gmem.at[at, along], x_smem.at[slot], full.at[slot])
            place = (across, along) if turned else (along, across)
            plgpu.copy_gmem_to_smem(w_gmem.at[place], w_smem.at[slot], full.at[slot])

        def operands(slot):
            own = pl.ds(pl.multiple_of(warpgroup * _ROWS, _ROWS), _ROWS)
            block = w_smem.at[slot]
            return x_smem.at[slot, own], block.transpose((1, 0)) if turned else block

        def store(product):
            start = pl.multiple_of(tile * tokens + warpgroup * _ROWS, _ROWS)
            across = pl.ds(pl.multiple_of(column * width, width), width)
            _store(product, staging.at[warpgroup], y_gmem.at[pl.ds(start, _ROWS), across])

        ring.run(counts_gmem[column], copy, operands, store, full=full, free=free, columns=width)

    y = ring.launch(
        kernel,
        (counts, indices, x, w),
        # Neighbours read the same tokens.
        grid={"tile": x.shape[0] // tokens, "column": indices.shape[0]},
        matrices=[(tokens, inner), tuple(side)],
        staging=(num_compute, _ROWS, width),
        out=jax.ShapeDtypeStruct((x.shape[0], out_width), dtype),
        num_copies=2,
        name="block_sparse_matmul_turned" if turned else "block_sparse_matmul",
    )
    return y[:num_rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ring:
    """Tiles in shared memory that are filled and used up in turn, and who does it.

    Attributes:
      num_steps: int, the most steps there may be.
      num_compute: int, warpgroups that multiply.
    """

    num_steps: int
    num_compute: int

    @property
    def stages(self) -> int:
        """Steps that the ring holds."""
        return min(_STAGES, self.num_steps)

    def run(
        self,
        count: Any,
        copy: Callable[[Any, Any], None],
        operands: Callable[[Any], tuple[Any, Any]],
        store: Callable[[jax.Array], None],
        *,
        full: Any,
        free: Any,
        columns: int,
    ) -> None:
        """Add the products of so many steps and store their sum.

        Args:
          count: int32, steps.
          copy: (step, slot) -> None, starts the copies of a step.
          operands: (slot) -> left and right operand of this warpgroup's product.
          store: (sum) -> None.
          full: barriers of filled slots.
          free: barriers of slots that were used up.
          columns: int, of the sum.
        """
        warpgroup, stages = lax.axis_index("warpgroup"), self.stages

        @pl.when(warpgroup == self.num_compute)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_step(step, _):
                slot = lax.rem(step, jnp.int32(stages))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                copy(step, slot)

            lax.fori_loop(0, count, copy_step, None)

            def drain(step, _):
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

            # So that no barrier is left with an arrival nobody waited for.
            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

        @pl.when(warpgroup < self.num_compute)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

            def add(acc):
                def step(step, _):
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, *operands(slot))
                    # One product stays in flight; that of the step before is done.
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, jnp.int32(stages))])

                lax.fori_loop(0, count, step, None)
                plgpu.wgmma_wait(0)

                @pl.when(count > 0)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(count - 1, jnp.int32(stages))])

                return acc[...]

            store(pl.run_scoped(add, plgpu.WGMMAAccumulatorRef((_ROWS, columns), jnp.float32)))

    def launch(
        self,
        kernel: Callable[..., None],
        operands: tuple[jax.Array, ...],
        *,
        grid: dict[str, int],
        matrices: list[tuple[int, ...]],
        staging: tuple[int, ...],
        out: jax.ShapeDtypeStruct,
        num_copies: int,
        name: str,
    ) -> jax.Array:
        """Start a kernel whose scratch is the ring, the staging memory and the barriers.

        Args:
          kernel: function of references.
          operands: arrays in GPU memory.
          grid: name -> size.
          matrices: shapes of what a slot holds.
          staging: shape of what is stored.
          out: shape and type of the result.
          num_copies: int, copies that fill a slot.
          name: str.

        Returns:
          array.
        """
        kernel.__name__ = name
        return plgpu.kernel(
            kernel,
            out_type=out,
            scratch_types=[
                *(matrix_smem((self.stages, *shape), out.dtype) for shape in matrices),
                matrix_smem(staging, out.dtype),
                plgpu.Barrier(num_arrivals=num_copies, num_barriers=self.stages),
                plgpu.Barrier(num_arrivals=self.num_compute, num_barriers=self.stages),
            ],
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=self.num_compute + 1,
            thread_name="warpgroup",
        )(*operands)


def _store(product: jax.Array, staging: Any, target: Any) -> None:
    staging[...] = product.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, target)
    plgpu.wait_smem_to_gmem(0)


def _pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    missing = -array.shape[0] % multiple
    return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
