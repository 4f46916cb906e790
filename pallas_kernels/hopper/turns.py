"""Two computing warpgroups that take turns on the tensor cores.

Left alone, both would start their products at the same time, and then both compute on registers
while the tensor cores idle. In turns, one multiplies while the other computes.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.hopper.budget import NUM_COMPUTE


def describe_turns() -> Any:
    """Describe the barriers of a program: scratch type, whose reference is `Turns.barriers`."""
    return plgpu.Barrier(num_barriers=NUM_COMPUTE)


class Turns(NamedTuple):
    """The turns of one computing warpgroup: the first begins, and each step is a turn.

    Where one has more steps than the other, it takes the last of them without waiting.

    Attributes:
      barriers: [2], of each computing warpgroup: the other has started its products.
      warpgroup: int32, whose turns these are.
      steps: int32, that it takes.
      others: int32, steps that the other takes.
    """

    barriers: Any
    warpgroup: Any
    steps: Any
    others: Any

    def take(self, step: Any) -> None:
        """Wait until the products of a step may be started.

        Args:
          step: int32.
        """
        # The first of the two waits for what the other has started in the step before.
        awaited = step - (1 - self.warpgroup)

        @pl.when((awaited >= 0) & (awaited < self.others))
        def _():
            plgpu.barrier_wait(self.barriers.at[self.warpgroup])

    def hand_over(self, step: Any) -> None:
        """Let the other warpgroup start products: those of this step are started.

        Args:
          step: int32.
        """

        # No arrival is left that nobody waits for.
        @pl.when(step + self.warpgroup < self.others)
        def _():
            plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup])
