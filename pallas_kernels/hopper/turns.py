"""Two computing warpgroups that take turns on the tensor cores.

Left alone, both would start their products at the same time, and then both compute on registers
while the tensor cores idle. In turns, one multiplies while the other computes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.hopper.budget import NUM_COMPUTE


def describe_turns() -> Any:
    """Describe the barriers of a program: scratch type, whose reference is `Turns.barriers`."""
    return plgpu.Barrier(num_barriers=NUM_COMPUTE)


class Turns(NamedTuple):
    """The turns of one computing warpgroup: the first begins, and each step is a turn.

    Each waits until the other has started its products, before the first step that the other has
    started those of the last. Where one has more steps than the other, it takes the last of them
    without waiting. After that the first begins again.

    Attributes:
      barriers: [2], of each computing warpgroup: the other has started its products. None if they
        take no turns, and nobody waits.
      warpgroup: int32, whose turns these are.
      common: int32, the step from which on this warpgroup, or the other one, has none; None if both
        have equally many.
    """

    barriers: Any
    warpgroup: Any
    common: Any = None

    def begin(self) -> None:
        """Let the first begin. Both call this once, before all steps."""
        self._arrive(0, self.warpgroup == 1)

    def end(self) -> None:
        """Take what is left of the turns. Both call this once, after all steps."""
        self._wait(self.warpgroup == 0)

    def take(self, step: Any) -> None:
        """Wait until the products of a step may be started.

        Args:
          step: int32.
        """
        self._wait(self._is_common(step))

    def hand_over(self, step: Any) -> None:
        """Let the other warpgroup start products: those of this step are started.

        Args:
          step: int32.
        """
        self._arrive(1 - self.warpgroup, self._is_common(step))

    def _is_common(self, step: Any) -> Any:
        return True if self.common is None else step < self.common

    def _wait(self, condition: Any) -> None:
        if self.barriers is not None:
            _run_if(condition, lambda: plgpu.barrier_wait(self.barriers.at[self.warpgroup]))

    def _arrive(self, warpgroup: Any, condition: Any) -> None:
        if self.barriers is not None:
            _run_if(condition, lambda: plgpu.barrier_arrive(self.barriers.at[warpgroup]))


def _run_if(condition: Any, do: Callable[[], None]) -> None:
    if condition is True:
        do()
    else:
        pl.when(condition)(do)
