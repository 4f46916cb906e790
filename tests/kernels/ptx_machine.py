"""A machine in NumPy that runs the PTX of one kernel, after the PTX ISA.

Every instruction is decoded once to a function of the threads that run it. Threads of a warpgroup
(or of a warp) that stand at the same instruction run as one vector; of several places, the earliest
goes first, so that threads meet again. What cannot go on (a barrier, an instruction that wants all
threads of a warp) waits, and if nothing can go on the machine says who waits for what. An
instruction that it does not know is an error.

Instructions of the asynchronous units are in `ptx_hopper` and `ptx_ampere`, those by which threads
wait for one another in `ptx_threads`, arithmetic is in `ptx_arithmetic`.
"""

import random
import re

import numpy as np

from tests.kernels import ptx_arithmetic
from tests.kernels.ptx_program import PtxError, split_operands

WARP, WARPGROUP = 32, 128
# A window's first kilobyte belongs to the system; kernels rely on the alignment that this gives.
SHARED_BASE, SHARED_SIZE = 1024, 232_448
GLOBAL_BASE, PARAM_BASE = 1 << 32, 1 << 48
_SPECIAL = re.compile(r"%(tid|ctaid|ntid|nctaid|cluster_ctaid)\.([xyz])")


class GlobalMemory:
    """Device memory: arrays, with gaps that nothing may touch."""

    def __init__(self):
        self._arrays, self._size = [], 0
        self.bytes = np.zeros(0, np.uint8)
        self.allowed = np.zeros(0, np.bool_)

    def add(self, array):
        """Copy an array to the device and return its address."""
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        start = self.bytes.size
        room = -(-raw.size // 256) * 256 + 256
        self.bytes = np.concatenate([self.bytes, np.zeros(room, np.uint8)])
        self.allowed = np.concatenate([self.allowed, np.arange(room) < raw.size])
        self.bytes[start : start + raw.size] = raw
        return GLOBAL_BASE + start

    def read(self, address, shape, dtype):
        """Copy an array back."""
        start, dtype = address - GLOBAL_BASE, np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape).copy()

    def offsets(self, addresses, size):
        """Return where in `bytes` some accesses are, each of `size` bytes."""
        offsets = addresses.astype(np.int64) - GLOBAL_BASE
        ends = offsets + size - 1
        inside = (offsets >= 0) & (ends < self.bytes.size)
        if not (inside.all() and self.allowed[offsets].all() and self.allowed[ends].all()):
            raise PtxError("outside of every array in global memory")
        return offsets


class Group:
    """Threads that stand at one place; `index` is a slice where they are consecutive."""

    def __init__(self, threads, pc):
        self.threads, self.pc, self.waits = threads, pc, None
        first, last = int(threads[0]), int(threads[-1])
        consecutive = last - first + 1 == len(threads)
        self.index = slice(first, last + 1) if consecutive else threads

    def covers(self, unit):
        """Whether the threads are whole warps, or whole warpgroups."""
        threads = self.threads
        return len(threads) % unit == 0 and bool(
            (threads.reshape(-1, unit)[:, 0] % unit == 0).all()
            and (np.diff(threads.reshape(-1, unit)) == 1).all()
        )


def whole(unit, step):
    """Let an instruction wait until all threads of each warp or warpgroup are there."""

    def waiting(group, index):
        if group.covers(unit):
            return step(group, index)
        return lambda: False, f"the other threads of {unit}", True

    return waiting


class Machine:
    """One block of threads with its registers and shared memory.

    Args:
      program: Program.
      memory: GlobalMemory.
      params: values of the parameters.
      block, grid: (x, y, z) of this block and of the launch.
      units: function of the machine that returns its other units, such as `HopperUnits`.
      pool: int, threads that run as one vector where they can: of a warp or of a warpgroup.
      order: whose turn it is of the pools, each of which runs until it waits: "first" to last,
        "last" to first, or "random".
      seed: int, of the random order.
      shared_size: int, bytes of shared memory.

    Attributes:
      registers: dict from name to an array with a value for each thread.
      shared: bytes as threads see them.
      async_shared: bytes as copies and tensor cores see them: what threads wrote is not there
        before a proxy fence.
      watch: function that units may set, called as `check_shared` at each access to shared memory.
    """

    def __init__(
        self, program, memory, params, block, grid, units,
        *, pool=WARPGROUP, order="first", seed=0, shared_size=SHARED_SIZE,
    ):  # fmt: skip
        self.program, self.memory, self.params = program, memory, params
        self.num_threads = program.num_threads
        self.special = {
            "tid": (np.arange(self.num_threads, dtype=np.uint32), 0, 0),
            "ctaid": block,
            "ntid": (self.num_threads, 1, 1),
            "nctaid": grid,
            "cluster_ctaid": (block[0] % program.cluster, 0, 0),
        }
        # Not a number in every format.
        self.shared = np.full(SHARED_BASE + shared_size, 0xFF, np.uint8)
        self.async_shared = self.shared.copy()
        self.registers = {}
        self.watch = None
        self.units = units(self)
        self.steps = [self._decode(i) for i in program.instructions]
        threads = np.arange(self.num_threads)
        self.pools = [
            [Group(part, 0)] for part in np.split(threads, max(1, self.num_threads // pool))
        ]
        self.order, self.random = order, random.Random(seed)

    def register(self, name):
        """Return the array of a register."""
        if name not in self.registers:
            kind = self.program.register_types.get(name)
            if kind is None:
                raise PtxError(f"unknown register {name}")
            fill = True if kind is np.bool_ else np.iinfo(kind).max
            self.registers[name] = np.full(self.num_threads, fill, kind)
        return self.registers[name]

    def reader(self, operand, dtype):
        """Return a function of an index that reads an operand as an array of a type."""
        dtype = np.dtype(dtype)
        if operand in self.program.register_types:
            register = self.register(operand)
            if register.dtype != np.bool_:
                if register.dtype.itemsize != dtype.itemsize:
                    raise PtxError(f"{operand} has {register.dtype}, not {dtype}")
                register = register.view(dtype)
            return register.__getitem__
        if special := _SPECIAL.fullmatch(operand):
            value = self.special[special[1]]["xyz".index(special[2])]
            if np.ndim(value):
                return value.astype(dtype).__getitem__
        elif operand.startswith(("__dynamic_shmem", "global_smem")):
            value = SHARED_BASE
        elif operand in self.program.params:
            value = PARAM_BASE + 4096 * self.program.params.index(operand)
        elif number := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            constant = np.array([int(number[1], 16)], np.uint32).view(dtype)
            return lambda index: constant
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.removesuffix("U"), 0)
        else:
            raise PtxError(f"unknown operand {operand}")
        if dtype == np.bool_:
            constant = np.array([bool(value)])
        else:
            width = 8 * dtype.itemsize
            constant = np.array([int(value) % (1 << width)], f"u{dtype.itemsize}").view(dtype)
        return lambda index: constant

    def writer(self, operand, dtype):
        """Return a function of an index and values that writes a register."""
        if operand == "_":
            return lambda index, values: None
        register = self.register(operand)
        if register.dtype != np.bool_:
            register = register.view(dtype)
        return register.__setitem__

    def address(self, operand, offset_by=0):
        """Return a function of an index that gives addresses of `[register + number]`."""
        match = re.fullmatch(r"\[([^\]+]+?)(?:\s*\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise PtxError(f"unknown address {operand}")
        base, offset = match[1].strip(), int(match[2] or 0) + offset_by
        is_wide = self.program.register_types.get(base) is not np.uint32
        read = self.reader(base, np.uint64 if is_wide else np.uint32)
        return lambda index: read(index).astype(np.int64) + offset

    def check_shared(self, threads, at, size, writes):
        """Raise if threads may not access `size` bytes each of shared memory at some addresses."""
        if (at % size).any():
            raise PtxError("an address is not aligned")
        if (at < SHARED_BASE).any() or (at + size > self.shared.size).any():
            raise PtxError("outside of shared memory")
        if self.watch is not None:
            self.watch(threads, at, size, writes)

    def _decode(self, instruction):
        try:
            for decode in (*self.units.decoders(), self._memory, self._arithmetic):
                step = decode(instruction)
                if step is not None:
                    return step
            if instruction.name[0] in ("bra", "ret"):
                return instruction.name[0]
        except (PtxError, KeyError, ValueError, IndexError) as error:
            raise PtxError(f"{instruction.text!r}: {error!r}") from error
        raise PtxError(f"unknown instruction {instruction.text!r}")

    def _arithmetic(self, instruction):
        return ptx_arithmetic.decode(self, instruction)

    def _memory(self, instruction):
        """Decode loads and stores."""
        name, operands = instruction.name, instruction.operands
        if name[0] not in ("ld", "st"):
            return None
        # Without a space it is any; those in global memory are the same, others are not known.
        is_generic = re.fullmatch(r"v\d|[busf]\d+", name[1]) is not None
        space, kind = "global" if is_generic else name[1].split("::")[0], name[-1]
        size = int(kind[1:]) // 8
        is_load = name[0] == "ld"
        data, place = operands if is_load else operands[::-1]
        registers = split_operands(data.strip("{}")) if data.startswith("{") else [data]
        dtype = f"u{size}"
        if space == "param":
            value = self.params[self.program.params.index(place.strip("[]"))]
            write = self.writer(data, dtype)
            return lambda group, index: write(index, np.uint64(value))
        if space not in ("shared", "global"):
            raise PtxError(f"unknown space {space}")
        address = self.address(place)
        access = [(self.writer if is_load else self.reader)(r, dtype) for r in registers]

        def step(group, index):
            at = address(index)
            if space == "global":
                if (at % (size * len(access))).any():
                    raise PtxError("an address is not aligned")
                at = self.memory.offsets(at, size * len(access))
                words = self.memory.bytes.view(dtype)
            else:
                self.check_shared(group.threads, at, size * len(access), not is_load)
                words = self.shared.view(dtype)
            at = at // size
            for i, one in enumerate(access):
                if is_load:
                    one(index, words[at + i])
                else:
                    _store(words, at + i, one(index))

        return step

    def run(self):
        """Run until every thread has returned."""
        run_together([self])

    def go_on(self):
        """Run until no thread can go on; return whether any did."""
        return any([self._run_pool(pool) for pool in self._in_turn()])

    def _in_turn(self):
        if self.order == "random":
            return self.random.sample(self.pools, len(self.pools))
        return {"first": self.pools, "last": self.pools[::-1]}[self.order]

    def list_waiting(self):
        """Yield a line for threads that cannot go on."""
        for pool in self.pools:
            for group in pool:
                text = self.program.instructions[group.pc].text
                why = group.waits[1] if group.waits else "?"
                yield f"  {len(group.threads)} from thread {group.threads[0]}: {why}: {text[:90]}"

    def _run_pool(self, pool):
        """Run the threads of a pool until none can go on; return whether any did."""
        progress = False
        while True:
            ready = [g for g in pool if g.waits is None or g.waits[0]()]
            if not ready:
                return progress
            group = min(ready, key=lambda g: g.pc)
            group.waits = None
            others = [g.pc for g in pool if g.pc > group.pc]
            moved = self._run_group(pool, group, min(others, default=len(self.steps)))
            progress |= moved
            _merge(pool)
            if not moved and group.waits is not None and len(ready) == 1:
                return progress

    def _run_group(self, pool, group, limit):
        """Run threads until they branch, wait or meet others; return whether they moved."""
        steps, instructions, start = self.steps, self.program.instructions, group.pc
        moved = False
        while group.pc < limit or not moved:
            instruction, step = instructions[group.pc], steps[group.pc]
            if step == "ret":
                pool.remove(group)
                return True
            if step == "bra":
                self._branch(pool, group, instruction)
                return True
            runs, index = group, group.index
            if instruction.predicate is not None:
                name, negated = instruction.predicate
                chosen = self.register(name)[index] != negated
                if not chosen.any():
                    group.pc, moved = group.pc + 1, True
                    continue
                if not chosen.all():
                    runs = Group(group.threads[chosen], group.pc)
                    index = runs.index
            try:
                waits = step(runs, index)
            except PtxError as error:
                raise PtxError(f"{instruction.text!r}: {error}") from error
            if waits is not None:
                group.waits = waits
                return moved
            group.pc, moved = group.pc + 1, True
        return moved or group.pc != start

    def _branch(self, pool, group, instruction):
        target = self.program.labels[instruction.operands[0]]
        if instruction.predicate is None:
            group.pc = target
            return
        name, negated = instruction.predicate
        taken = self.register(name)[group.index] != negated
        if taken.all() or not taken.any():
            group.pc = target if taken.all() else group.pc + 1
            return
        pool.remove(group)
        pool.append(Group(group.threads[taken], target))
        pool.append(Group(group.threads[~taken], group.pc + 1))


def _merge(pool):
    """Join threads that stand at the same place, unless they wait for an event of their own."""
    places = {}
    for group in list(pool):
        if group.waits is not None and not group.waits[2]:
            continue
        other = places.setdefault(group.pc, group)
        if other is not group:
            pool.remove(group)
            pool.remove(other)
            places[group.pc] = Group(
                np.sort(np.concatenate([other.threads, group.threads])), group.pc
            )
            pool.append(places[group.pc])


def _store(words, at, values):
    """Store a value of each thread. Where all have one place, they may not disagree."""
    if at.size == 1 and values.size > 1:
        if (values != values.flat[0]).any():
            raise PtxError("threads store different values in one place")
        values = values.flat[0]
    words[at] = values


def run_together(machines):
    """Run blocks that wait for one another until every thread has returned.

    Args:
      machines: list of Machine.
    """
    with np.errstate(all="ignore"):
        while any(any(machine.pools) for machine in machines):
            progress = [machine.go_on() for machine in machines]
            if not any(progress) and not any(machine.units.advance() for machine in machines):
                waiting = [line for machine in machines for line in machine.list_waiting()]
                raise PtxError("no thread can go on:\n" + "\n".join(waiting))
    for machine in machines:
        machine.units.check_end()
