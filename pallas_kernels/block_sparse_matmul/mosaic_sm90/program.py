"""What the warpgroups of a program share: operands, memory, rings, and which tiles they take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import Lists, Plan
from pallas_kernels.hopper.budget import NUM_COMPUTE
from pallas_kernels.hopper.launch import CLUSTER, for_each_tile
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem

ANNOUNCED = 2
"""Lists that are announced ahead."""


class Operands(NamedTuple):
    """What the kernel reads: arrays, and in it references to global memory."""

    lhs: Any
    rhs: Any
    lists: Lists
    bias: Any


class Exchange(NamedTuple):
    """Where the second warpgroup leaves its sum for the first.

    Attributes:
      smem: f32, the sum.
      full: barrier: it is there.
      free: barrier: it has been read.
    """

    smem: Any
    full: Any
    free: Any


class Scratch(NamedTuple):
    """Shared memory: scratch types, and in the kernel references.

    Attributes:
      ring: see `describe_ring`; tiles of both operands, [slots, parts, ...].
      announced: the same; what `Program.read_list` says of a list, int32[slots].
      staging: [2, ...], the result of each warpgroup.
      bias: [2, columns] or None.
      bias_full: barriers, [2], or None.
      other: Exchange, or None where the warpgroups do not sum the same tile.
    """

    ring: Any
    announced: Any
    staging: Any
    bias: Any
    bias_full: Any
    other: Any


class Program(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
      operands: Operands in global memory.
      out: reference to the result in global memory.
      scratch: shared memory of the program.
      ring: Ring of the operands.
      announced: Ring of lists, one for each tile.
      num_clusters: int, programs or clusters of them, that share the tiles.
    """

    plan: Plan
    operands: Operands
    out: Any
    scratch: Scratch
    ring: Ring
    announced: Ring
    num_clusters: int

    def for_each_tile(self, body: Callable[[Any, Any, Any], Any], state: Any) -> Any:
        """Run a body on the tiles of this program.

        Args:
          body: function (row_tile, unit, state) -> state; the first two are int32, a row tile and
            the list that it takes.
          state: what the first tile gets.

        Returns:
          state after the last tile.
        """
        plan, num_lists = self.plan, self.operands.lists.owners.shape[0]
        rank = lax.axis_index(CLUSTER) if plan.cluster > 1 else 0
        return for_each_tile(
            lambda tile, state: body(*plan.locate(tile, num_lists, rank), state),
            state,
            num_tiles=plan.count_shared_tiles(num_lists),
            num_programs=self.num_clusters,
        )

    def read_list(self, unit: Any) -> dict[str, Any]:
        """Read what a list is for from global memory.

        Args:
          unit: int32, which.

        Returns:
          name -> int32: "owner" and "steps", and "other" where a tile may have two blocks.
        """
        lists = self.operands.lists
        numbers = {
            "owner": lists.owners[unit],
            "steps": lists.counts[unit] * self.plan.steps_per_entry,
        }
        return numbers if lists.others is None else numbers | {"other": lists.others[unit]}


def describe_scratch(plan: Plan, stages: int, dtype: Any, *, has_bias: bool) -> Scratch:
    """Describe the shared memory of a program.

    Args:
      stages: int, steps that the ring holds.
      dtype: of operands and result.
    """
    parts = {"lhs": plan.lhs.parts, "rhs": plan.blocks * plan.rhs.parts}
    smem = {
        side: matrix_smem((stages, parts[side], *tile.shape), dtype)
        for side, tile in (("lhs", plan.lhs), ("rhs", plan.rhs))
    }
    names = ("owner", "steps", "other")[: 1 + plan.blocks]
    bias = bias_full = other = None
    if has_bias:
        bias = plgpu.SMEM((NUM_COMPUTE, plan.shape[1]), dtype)
        bias_full = plgpu.Barrier(num_barriers=NUM_COMPUTE)
    if plan.is_split:
        barriers = plgpu.Barrier(num_barriers=1), plgpu.Barrier(num_barriers=1)
        other = Exchange(matrix_smem(plan.shape, jnp.float32), *barriers)
    return Scratch(
        ring=describe_ring(
            smem, copies=sum(parts.values()), readers=NUM_COMPUTE, cluster=plan.cluster
        ),
        announced=describe_ring(
            {name: plgpu.SMEM((ANNOUNCED,), jnp.int32) for name in names},
            copies=1,
            readers=NUM_COMPUTE,
        ),
        staging=matrix_smem((NUM_COMPUTE, *plan.shape), dtype),
        bias=bias,
        bias_full=bias_full,
        other=other,
    )
