"""How a kernel with two computing warpgroups and a copying one is run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.budget import COMPUTE_REGISTERS, COPY_REGISTERS, NUM_COMPUTE
from pallas_kernels.mosaic_call import call_mosaic

CLUSTER = "cluster"
"""Name of the axis along which programs of a cluster lie."""


def launch_kernel(
    make_program: Callable[..., tuple[Callable[[], None], Callable[[Any], None]]],
    inputs: Any,
    *,
    out_type: Any,
    scratch: Any,
    num_programs: int,
    name: str,
    cluster: int = 1,
    approx_math: bool = False,
) -> Any:
    """Run a kernel whose programs have two computing warpgroups and a copying one.

    Args:
      make_program: function of the references to inputs, outputs and scratch memory, each shaped
        like the pytree that is given here. It returns what the copying warpgroup runs, a function
        without arguments, and what each computing one runs, a function of its number.
      inputs: pytree of arrays.
      out_type: pytree of `jax.ShapeDtypeStruct`.
      scratch: pytree of scratch types of `plgpu.kernel`.
      num_programs: int, size of the grid: programs, or clusters of them.
      name: str, of the kernel.
      cluster: int, programs that start together and share what is copied; they lie along `CLUSTER`.
      approx_math: bool, exponentials and divisions are those of the hardware.

    Returns:
      pytree of arrays as `out_type` says.
    """
    inputs, input_tree = jax.tree.flatten(inputs)
    outs, out_tree = jax.tree.flatten(out_type)
    scratch, scratch_tree = jax.tree.flatten(scratch)

    def kernel(*refs):
        ends = len(inputs), len(inputs) + len(outs)
        copy, compute = make_program(
            jax.tree.unflatten(input_tree, refs[: ends[0]]),
            jax.tree.unflatten(out_tree, refs[ends[0] : ends[1]]),
            jax.tree.unflatten(scratch_tree, refs[ends[1] :]),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            copy()

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            compute(warpgroup)

    kernel.__name__ = name
    results = call_mosaic(
        kernel,
        *inputs,
        out_type=outs,
        scratch_types=scratch,
        grid=(num_programs,),
        grid_names=("program",),
        **_describe_cluster(cluster),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
    )
    return jax.tree.unflatten(out_tree, results)


def _describe_cluster(size: int) -> dict[str, Any]:
    return {"cluster": (size,), "cluster_names": (CLUSTER,)} if size > 1 else {}


def for_each_tile(
    body: Callable[[Any, Any], Any], state: Any, *, num_tiles: int, num_programs: int
) -> Any:
    """Run a body on the tiles of this program, or of its cluster: one of every `num_programs`.

    Every other time programs take them in the reverse order. Where the first tiles take longest,
    whoever had the longest has the shortest next.

    Args:
      body: function (int32, state) -> state, of the number of a tile.
      state: what the first tile gets.
      num_tiles: int, of all programs.
      num_programs: int, at most as many programs or clusters have tiles.

    Returns:
      state after the last tile.
    """
    program = lax.axis_index("program")

    def find_place(turn):
        is_reversed = lax.rem(jnp.int32(turn), jnp.int32(2)) == 1
        return jnp.where(is_reversed, num_programs - 1 - program, program)

    def take(turn, state):
        return body(turn * num_programs + find_place(turn), state)

    whole, rest = divmod(num_tiles, num_programs)
    count = whole + (find_place(whole) < rest).astype(jnp.int32)
    return lax.fori_loop(0, count, take, state)
