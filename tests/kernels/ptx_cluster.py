"""Blocks of a cluster on `ptx_machine`: how they meet, and reach each other's shared memory."""

import numpy as np

from tests.kernels.ptx_program import PtxError

# Shared memory of the block with rank r, as the whole cluster sees it, begins at (r + 1) windows.
_WINDOW = 1 << 20


class Cluster:
    """Blocks that run side by side.

    Attributes:
      units: list of `HopperUnits`, by rank.
    """

    def __init__(self):
        self.units = []
        # Threads, over all phases of the barrier of the cluster.
        self._arrived = 0

    def join(self, units):
        """Add the units of the block with the next rank."""
        self.units.append(units)

    def find_barrier(self, address):
        """Return the barrier at an address of the cluster, as `mapa` makes them."""
        rank, at = divmod(address, _WINDOW)
        return self.units[rank - 1].barriers[at]

    def decode(self, machine, instruction):
        """Return a function that runs an instruction of a block, or None."""
        name, operands = instruction.name, instruction.operands
        if name[:2] == ["barrier", "cluster"]:
            return {"arrive": self._arrive, "wait": self._wait}[name[2]]
        if name[0] == "mapa" and name[1] == "shared::cluster":
            write = machine.writer(operands[0], "u4")
            address, rank = (machine.reader(x, "u4") for x in operands[1:])

            def map_address(group, index):
                ranks = rank(index)
                if (ranks >= len(self.units)).any():
                    raise PtxError(f"a block beyond the {len(self.units)} of the cluster")
                write(index, address(index) + (ranks + 1) * np.uint32(_WINDOW))

            return map_address
        if instruction.opcode == "mbarrier.arrive.shared::cluster.b64":
            read = machine.address(operands[1])

            def arrive(group, index):
                for at in np.broadcast_to(read(index), len(group.threads)).tolist():
                    self.find_barrier(at).arrive(1)

            return arrive
        return None

    @property
    def _num_threads(self):
        return sum(units.machine.num_threads for units in self.units)

    def _arrive(self, group, index):
        self._arrived += len(group.threads)

    def _wait(self, group, index):
        # Kernels meet once, before they begin.
        if self._arrived == self._num_threads:
            return None
        return (
            lambda: self._arrived == self._num_threads,
            f"the cluster, {self._arrived} are there",
            False,
        )
