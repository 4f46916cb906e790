"""Instructions of `ptx_machine` by which threads wait for one another or exchange registers."""

import numpy as np

from tests.kernels.ptx_machine import WARP, whole
from tests.kernels.ptx_program import PtxError


class ThreadUnits:
    """Barriers of one block, and what lanes of a warp do together.

    Args:
      machine: Machine.
      met: function, called with the number of threads that have met at a barrier.
    """

    def __init__(self, machine, met=lambda count: None):
        self.machine, self.met = machine, met
        # Of each barrier: how often it was passed, and which threads are there.
        self.named = {}

    def decode(self, instruction):
        """Return a function that runs an instruction, or None."""
        name, operands = instruction.name, instruction.operands
        base = name[0]
        if base == "bar" and name[1:] == ["warp", "sync"]:
            return whole(WARP, lambda group, index: None) if operands == ["-1"] else None
        if base in ("bar", "barrier") and "sync" in name:
            return self._bar(operands)
        if base == "elect":
            lane, elected = operands[0].split("|")
            write, write_lane = self.machine.writer(elected, "?"), self.machine.writer(lane, "u4")

            def elect(group, index):
                write(index, group.threads % WARP == 0)
                write_lane(index, 0)

            return whole(WARP, elect)
        if base == "shfl" and name[1] == "sync":
            return self._shuffle(name[2], operands)
        return None

    def _bar(self, operands):
        read = self.machine.reader(operands[0], "u4")
        count = self.machine.reader(operands[1], "u4") if len(operands) > 1 else None

        def step(group, index):
            (which,) = set(np.broadcast_to(read(index), len(group.threads)).tolist())
            wanted = int(count(index).flat[0]) if count else self.machine.num_threads
            generation, arrived = self.named.setdefault(which, [0, set()])
            if group.threads[0] in arrived:
                raise PtxError(f"a thread arrives twice at barrier {which}")
            arrived |= set(group.threads.tolist())
            if len(arrived) > wanted:
                raise PtxError(f"{len(arrived)} threads at barrier {which} of {wanted}")
            if len(arrived) == wanted:
                self.named[which] = [generation + 1, set()]
                self.met(wanted)
                return None
            # Those that waited go on behind the barrier.
            group.pc += 1
            why = f"barrier {which}, {len(arrived)} are there"
            return lambda: self.named[which][0] > generation, why, False

        return step

    def _shuffle(self, mode, operands):
        write = self.machine.writer(operands[0], "u4")
        read, lane_of = (self.machine.reader(x, "u4") for x in operands[1:3])
        if operands[3:] != ["31", "-1"] or mode not in ("idx", "bfly"):
            raise PtxError("this form of shfl is unknown")

        def step(group, index):
            values = np.broadcast_to(read(index), len(group.threads)).reshape(-1, WARP)
            lanes = np.broadcast_to(lane_of(index), len(group.threads)).reshape(-1, WARP)
            if mode == "bfly":
                lanes = lanes ^ np.arange(WARP, dtype=np.uint32)
            write(index, np.take_along_axis(values, (lanes & 31).astype(np.int64), 1).ravel())

        return whole(WARP, step)
