"""Hopper's asynchronous instructions for `ptx_machine`: barriers and bulk copies.

What is asynchronous may happen at any time between where it is started and where it is waited for.
Both ends are tried: copies land at once (`copies="early"`) or not before some thread cannot go on
without them ("late"), or at random; of products, see `ptx_tensor_cores`. A program that is right at
both ends does not depend on luck.
"""

import dataclasses
import functools
import random
import re

import numpy as np

from tests.kernels.ptx_machine import PARAM_BASE, SHARED_BASE
from tests.kernels.ptx_program import PtxError, split_operands
from tests.kernels.ptx_tensor_cores import TensorCores, swizzle
from tests.kernels.ptx_threads import ThreadUnits

# Instructions that order what this machine does in order, or that only say how fast to run.
_NOTHING = ("setmaxnreg", "griddepcontrol")


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A descriptor of a copy, outermost dimension first.

    Attributes:
      address: int, in global memory.
      item: int, bytes of an element.
      sizes: elements.
      strides: elements.
      swizzle: bytes, 16 if there is none.
      box: elements of one copy.
    """

    address: int
    item: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def expect(self, size):
        """Count bytes that are to come (or, negative, that came)."""
        self.bytes += size
        self._end_phase()

    def arrive(self, count):
        """Count arrivals, which may be those of several phases."""
        while count:
            if self.pending == 0:
                raise PtxError("an arrival after all of the phase's")
            now = min(count, self.pending)
            self.pending, count = self.pending - now, count - now
            self._end_phase()

    def _end_phase(self):
        if self.pending == 0 == self.bytes:
            self.pending, self.phase = self.count, self.phase + 1


class HopperUnits:
    """The asynchronous units of one block.

    Args:
      machine: Machine.
      maps: address -> TensorMap.
      cluster: Cluster that the block joins.
      reads: see `TensorCores`.
      copies: when copies land, "early", "late" or "random".
      seed: int, of what is random.
    """

    def __init__(self, machine, maps, cluster, *, reads="late", copies="late", seed=0):
        self.machine, self.maps, self.cluster = machine, maps, cluster
        self.copies = copies
        self.tensor_cores = TensorCores(machine, reads)
        self.random = random.Random(seed)
        self.threads = ThreadUnits(machine)
        self.barriers = {}
        self.loads = []
        # Of each thread: copies to global memory that are not committed, and groups of them.
        self.stores, self.store_groups = {}, {}
        cluster.join(self)

    def decoders(self):
        """Return functions that decode an instruction or return None."""
        in_cluster = functools.partial(self.cluster.decode, self.machine)
        own = self._sync, self._mbarrier, self._copy
        return (in_cluster, *own, *self.tensor_cores.decoders())

    def advance(self):
        """Let one copy land, as no thread can go on; return whether there was one."""
        if not self.loads:
            return False
        at = self.random.randrange(len(self.loads)) if self.copies == "random" else 0
        self.loads.pop(at)()
        return True

    def check_end(self):
        """Raise if a block ends while something is on its way."""
        left = [t for t, groups in self.store_groups.items() if any(groups)]
        left += [t for t, copies in self.stores.items() if copies]
        if left or self.loads:
            raise PtxError(f"copies are on their way at the end: {len(self.loads)}, {left}")
        self.tensor_cores.check_end()
        for address, barrier in self.barriers.items():
            if barrier.pending != barrier.count or barrier.bytes:
                raise PtxError(f"the barrier at {address} is in the middle of a phase")

    # Threads that wait for one another.

    def _sync(self, instruction):
        name = instruction.name
        base = name[0]
        if base in _NOTHING:
            return lambda group, index: None
        if base == "fence":
            if name[1] == "proxy":
                return self._proxy_fence
            return (lambda group, index: None) if name[1] == "mbarrier_init" else None
        return self.threads.decode(instruction)

    def _proxy_fence(self, group, index):
        # All that threads wrote, also other threads: those have met this one at a barrier, or else
        # the program is wrong in a way that this does not see.
        self.machine.async_shared[:] = self.machine.shared

    # Barriers in shared memory.

    def _mbarrier(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[0] != "mbarrier":
            return None
        machine = self.machine
        if name[1] == "init":
            address, count = machine.address(operands[0]), machine.reader(operands[1], "u4")

            def step(group, index):
                (at,) = set(address(index).tolist())
                self.barriers[at] = Barrier(int(count(index).flat[0]))

            return step
        if name[1] == "arrive":
            address = machine.address(operands[1])
            number = machine.reader(operands[2], "u4") if len(operands) > 2 else None
            expects = name[2] == "expect_tx"

            def step(group, index):
                size = len(group.threads)
                values = np.ones(size, int) if number is None else number(index)
                values = np.broadcast_to(values, size).astype(int)
                places = np.broadcast_to(address(index), size)
                for at in np.unique(places).tolist():
                    here = values[places == at]
                    if expects:
                        self.barriers[at].expect(int(here.sum()))
                    self.barriers[at].arrive(here.size if expects else int(here.sum()))
                if self.copies == "random" and self.loads and self.random.random() < 0.5:
                    self.advance()

            return step
        if name[1] == "try_wait" and name[2] == "parity":
            write = machine.writer(operands[0], "?")
            address, parity = machine.address(operands[1]), machine.reader(operands[2], "u4")

            def step(group, index):
                pairs = np.broadcast_arrays(address(index), parity(index))
                pairs = set(zip(*(x.tolist() for x in pairs), strict=True))

                def is_over():
                    return all(self.barriers[at].phase % 2 != p for at, p in pairs)

                if is_over():
                    write(index, True)
                    return None
                text = [(at, p, vars(self.barriers[at])) for at, p in pairs]
                return is_over, f"mbarrier (address, parity, state) {text}", False

            return step
        return None

    # Bulk copies.

    def _copy(self, instruction):
        name, operands = instruction.opcode, instruction.operands
        if not name.startswith("cp.async.bulk"):
            return None
        rest = name.removeprefix("cp.async.bulk")
        if rest == ".commit_group":
            return self._commit_stores
        if rest in (".wait_group", ".wait_group.read"):
            return lambda group, index: self._wait_stores(group, int(operands[0]))
        read = self.machine.address
        to_shared = ".mbarrier::complete_tx::bytes"
        if re.fullmatch(rf"\.tensor\.\dd\.shared::(cluster|cta)\.global(\.tile)?{to_shared}", rest):
            target, barrier = read(operands[0]), read(operands[2])
            box = self._box(operands[1])
            return _one(lambda index: self._load(box(index), target(index), barrier(index)))
        if re.fullmatch(
            rf"\.tensor\.\dd\.shared::cluster\.global(\.tile)?{to_shared}\.multicast::cluster", rest
        ):
            target, barrier = read(operands[0]), read(operands[2])
            box, mask = self._box(operands[1]), self.machine.reader(operands[3], "u2")

            def load_in_each(index):
                which = int(mask(index).flat[0])
                for rank, units in enumerate(self.cluster.units):
                    if which >> rank & 1:
                        units._load(box(index), target(index), barrier(index))

            return _one(load_in_each)
        if re.fullmatch(r"\.tensor\.\dd\.global\.shared::cta(\.tile)?\.bulk_group", rest):
            box, source = self._box(operands[0]), read(operands[1])

            def store(group, index):
                thread, box_at, at = int(group.threads[0]), box(index), int(source(index)[0])
                self.stores.setdefault(thread, []).append(lambda: self._write_global(*box_at, at))

            return _one(store, with_group=True)
        size = self.machine.reader(operands[2], "u4")
        if rest == ".global.shared::cta.bulk_group":
            target, source = read(operands[0]), read(operands[1])

            def store_bytes(group, index):
                to, at, count = (int(x(index).flat[0]) for x in (target, source, size))
                box_at = _flat(to, count)
                self.stores.setdefault(int(group.threads[0]), []).append(
                    lambda: self._write_global(*box_at, at)
                )

            return _one(store_bytes, with_group=True)
        if rest in (f".shared::{s}.global{to_shared}" for s in ("cta", "cluster")):
            target, source, barrier = read(operands[0]), read(operands[1]), read(operands[3])
            return _one(
                lambda index: self._load(
                    _flat(int(source(index)[0]), int(size(index).flat[0])),
                    target(index), barrier(index),
                )
            )  # fmt: skip
        return None

    def _box(self, operand):
        """Return a function that gives the map and the first element of a box."""
        descriptor, coordinates = split_operands(operand.strip("[]"))
        pointer = self.machine.reader(descriptor, "u8")
        reads = [self.machine.reader(x, "i4") for x in split_operands(coordinates.strip("{} "))]

        def step(index):
            at = int(pointer(index).flat[0])
            if at not in self.maps:
                raise PtxError(f"no descriptor at {at - PARAM_BASE}")
            first = tuple(int(read(index).flat[0]) for read in reads[::-1])
            return self.maps[at], first

        return step

    def _places(self, tensor, first, at):
        """Return byte offsets in global memory, whether they are inside, and in shared memory."""
        indices = np.indices(tensor.box).reshape(len(tensor.box), -1).T + np.array(first)
        inside = ((indices >= 0) & (indices < np.array(tensor.sizes))).all(axis=1)
        source = tensor.address + tensor.item * (indices @ np.array(tensor.strides))
        linear = at + tensor.item * np.arange(len(indices))
        if tensor.swizzle > 16 and tensor.box[-1] * tensor.item > tensor.swizzle:
            raise PtxError("a row of the box is longer than the swizzle")
        if at % 16 or at < SHARED_BASE or linear[-1] >= self.machine.shared.size:
            raise PtxError(f"a copy at {at} of shared memory")
        return source, inside, swizzle(linear, tensor.swizzle)

    def _load(self, box, target, barrier):
        tensor, first = box
        at, barrier = int(target[0]), self.barriers[int(barrier[0])]
        item = f"u{tensor.item}"

        def land():
            source, inside, places = self._places(tensor, first, at)
            memory = self.machine.memory
            offsets = memory.offsets(source[inside], tensor.item) // tensor.item
            values = np.zeros(len(source), item)
            values[inside] = memory.bytes.view(item)[offsets]
            for shared in (self.machine.shared, self.machine.async_shared):
                shared.view(item)[places // tensor.item] = values
            barrier.expect(-len(source) * tensor.item)

        if self.copies == "early":
            # The bytes may come before the barrier knows of them.
            land()
        else:
            self.loads.append(land)

    def _write_global(self, tensor, first, at):
        target, inside, places = self._places(tensor, first, at)
        memory, item = self.machine.memory, f"u{tensor.item}"
        offsets = memory.offsets(target[inside], tensor.item) // tensor.item
        values = self.machine.async_shared.view(item)[places[inside] // tensor.item]
        memory.bytes.view(item)[offsets] = values

    def _commit_stores(self, group, index):
        for thread in set(self.stores) & set(group.threads.tolist()):
            copies = self.stores.pop(thread)
            if self.copies == "early":
                for copy in copies:
                    copy()
                copies = []
            self.store_groups.setdefault(thread, []).append(copies)

    def _wait_stores(self, group, left):
        for thread in set(self.store_groups) & set(group.threads.tolist()):
            groups = self.store_groups[thread]
            while len(groups) > left:
                for copy in groups.pop(0):
                    copy()


def _flat(address, size):
    """A copy of bytes in a row, as a box."""
    return TensorMap(address, 4, (size // 4,), (1,), 16, (size // 4,)), (0,)


def _one(step, *, with_group=False):
    """Run an instruction that one thread issues."""

    def single(group, index):
        for thread in group.threads.tolist():
            at = slice(thread, thread + 1)
            if with_group:
                one = type(group)(np.array([thread]), group.pc)
                step(one, at)
            else:
                step(at)

    return single
