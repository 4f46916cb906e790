"""Hopper's asynchronous instructions for `ptx_machine`: barriers, bulk copies, tensor cores.

What is asynchronous may happen at any time between where it is started and where it is waited for.
Both ends are tried: products read memory, metadata and registers as these are when they are issued
(`reads="early"`) or when they are waited for ("late"); copies land at once or not before some
thread cannot go on without them. A program that is right at both ends does not depend on luck.
"""

import dataclasses
import random
import re

import numpy as np

from tests.kernels.ptx_arithmetic import widen_bf16
from tests.kernels.ptx_machine import (
    PARAM_BASE,
    SHARED_BASE,
    WARP,
    WARPGROUP,
    PtxError,
    split_operands,
)

_LANE = np.arange(WARPGROUP) % WARP
_WARP = np.arange(WARPGROUP) // WARP
# Instructions that order what this machine does in order, or that only say how fast to run.
_NOTHING = ("setmaxnreg", "griddepcontrol")


def swizzle(address, size):
    """Return where memory has a byte: chunks of 16 bytes change places by rows of 128 bytes."""
    mask = {128: 7, 64: 3, 32: 1, 16: 0}[size]
    return address ^ ((address >> 7 & mask) << 4)


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


@dataclasses.dataclass(frozen=True)
class Operand:
    """A descriptor of a matrix in shared memory for tensor cores."""

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def unpack(cls, bits):
        """Take the 64 bits apart."""
        if bits >> 49 & 7:
            raise PtxError("descriptors with a base offset are unknown")
        mode = {1: 128, 2: 64, 3: 32}.get(bits >> 62)
        if mode is None:
            raise PtxError("descriptors without swizzle are unknown")
        field = [(bits >> at & 0x3FFF) << 4 for at in (0, 16, 32)]
        return cls(*field, mode)

    def addresses(self, outer, inner, *, contraction_is_inner):
        """Return where elements of 16 bits are: `outer` rows or columns by `inner` contraction."""
        n, k = np.arange(outer)[:, None], np.arange(inner)
        width = self.swizzle // 2
        if contraction_is_inner:
            if self.start % self.swizzle + 2 * inner > self.swizzle:
                raise PtxError("an operand reaches over the end of its swizzled rows")
            at = n // 8 * self.stride + n % 8 * self.swizzle + 2 * k
        else:
            at = n // width * self.leading + n % width * 2
            at = at + k // 8 * self.stride + k % 8 * self.swizzle
        return swizzle(self.start + at, self.swizzle)


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


@dataclasses.dataclass
class Products:
    """Tensor-core instructions of one warpgroup: not committed, and committed groups."""

    started: list = dataclasses.field(default_factory=list)
    groups: list = dataclasses.field(default_factory=list)


class HopperUnits:
    """The asynchronous units of one block."""

    def __init__(self, machine, maps, *, reads="late", copies="late", seed=0):
        self.machine, self.maps = machine, maps
        self.reads, self.copies = reads, copies
        self.random = random.Random(seed)
        self.barriers, self.named = {}, {}
        self.products = {}
        self.loads = []
        # Of each thread: copies to global memory that are not committed, and groups of them.
        self.stores, self.store_groups = {}, {}
        self.fenced = True

    def decoders(self):
        """Return functions that decode an instruction or return None."""
        return (self._sync, self._mbarrier, self._copy, self._wgmma, self._stmatrix)

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
        for products in self.products.values():
            if products.started or products.groups:
                raise PtxError("products are on their way at the end")
        for address, barrier in self.barriers.items():
            if barrier.pending != barrier.count or barrier.bytes:
                raise PtxError(f"the barrier at {address} is in the middle of a phase")

    # Threads that wait for one another.

    def _sync(self, instruction):
        name, operands = instruction.name, instruction.operands
        base = name[0]
        if base in _NOTHING:
            return lambda group, index: None
        if base == "fence":
            if name[1] == "proxy":
                return self._proxy_fence
            return (lambda group, index: None) if name[1] == "mbarrier_init" else None
        if base in ("bar", "barrier") and "sync" in name:
            return self._bar(operands)
        if base == "elect":
            lane, elected = operands[0].split("|")
            write, write_lane = self.machine.writer(elected, "?"), self.machine.writer(lane, "u4")

            def elect(group, index):
                write(index, group.threads % WARP == 0)
                write_lane(index, 0)

            return _whole(WARP, elect)
        if base == "shfl" and name[1] == "sync":
            return self._shuffle(name[2], operands)
        return None

    def _proxy_fence(self, group, index):
        # All that threads wrote, also other threads: those have met this one at a barrier, or else
        # the program is wrong in a way that this does not see.
        self.machine.async_shared[:] = self.machine.shared

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

        return _whole(WARP, step)

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

    # Tensor cores.

    def _wgmma(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[0] != "wgmma":
            return None
        if name[1] == "fence":
            return _whole(WARPGROUP, lambda group, index: None)
        if name[1] == "commit_group":

            def commit(group, index):
                for products in self._products(group):
                    products.groups.append(products.started)
                    products.started = []

            return _whole(WARPGROUP, commit)
        if name[1] == "wait_group":

            def wait(group, index):
                for products in self._products(group):
                    while len(products.groups) > int(operands[0]):
                        for product in products.groups.pop(0):
                            product()

            return _whole(WARPGROUP, wait)
        return _whole(WARPGROUP, self._multiply(instruction)) if name[1] == "mma_async" else None

    def _products(self, group):
        for first in group.threads[::WARPGROUP].tolist():
            yield self.products.setdefault(first, Products())

    def _multiply(self, instruction):
        name, operands = instruction.name, instruction.operands
        is_sparse = "sp" in name
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", name[-4])
        columns, depth = int(shape[1]), int(shape[2])
        if name[-3] != "f32" or name[-1] != name[-2] or depth != (32 if is_sparse else 16):
            raise PtxError("this product is unknown")
        dtype, machine = name[-1], self.machine
        sums = [machine.register(x.strip()) for x in split_operands(operands[0].strip("{}"))]
        if len(sums) != columns // 2:
            raise PtxError(f"{len(sums)} sums of {columns} columns")
        in_registers = operands[1].startswith("{")
        if in_registers:
            left = [machine.register(x.strip()) for x in split_operands(operands[1].strip("{}"))]
        else:
            left = machine.reader(operands[1], "u8")
        right = machine.reader(operands[2], "u8")
        rest = operands[3:]
        word, selector = None, None
        if is_sparse:
            word, selector, rest = machine.register(rest[0]), int(rest[1]), rest[2:]
        adds = machine.reader(rest[0], "?")
        flags = [int(x) for x in rest[1:]]
        if flags[:2] != [1, 1] or len(flags) != (3 if in_registers else 4):
            raise PtxError(f"unknown flags {flags}")
        left_outside, right_outside = [0, *flags[2:]] if in_registers else flags[2:]
        row, column = accumulator_places(columns)

        def start(first, index):
            describe_a = None if in_registers else _descriptor(left, index)
            describe_b, is_added = _descriptor(right, index), bool(np.all(adds(index)))

            def run():
                stored = depth // 2 if is_sparse else depth
                if in_registers:
                    words = np.stack([x[index] for x in left])
                    a = _to_float(unpack_left(words), dtype)
                else:
                    a = self._read(describe_a, 64, stored, not left_outside, dtype)
                if is_sparse:
                    a = spread(a, word[index], selector)
                b = self._read(describe_b, columns, depth, not right_outside, dtype)
                product = (a @ b.T)[row, column]
                for register, values in zip(sums, product, strict=True):
                    before = register[index].view(np.float32) if is_added else np.float32(0)
                    register[index] = (before + values).view(np.uint32)

            if self.reads == "early":
                run()
            else:
                self.products.setdefault(first, Products()).started.append(run)

        def step(group, index):
            for first in group.threads[::WARPGROUP].tolist():
                start(first, slice(first, first + WARPGROUP))

        return step

    def _read(self, operand, outer, inner, contraction_is_inner, dtype):
        places = operand.addresses(outer, inner, contraction_is_inner=contraction_is_inner)
        if places.min() < SHARED_BASE or places.max() >= self.machine.shared.size:
            raise PtxError("an operand outside of shared memory")
        return _to_float(self.machine.async_shared.view(np.uint16)[places // 2], dtype)

    def _stmatrix(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[0] != "stmatrix":
            return None
        if instruction.opcode.replace(".trans", "") != "stmatrix.sync.aligned.m8n8.x4.shared.b16":
            raise PtxError("this form of stmatrix is unknown")
        address = self.machine.address(operands[0])
        registers = [
            self.machine.reader(x.strip(), "u4") for x in split_operands(operands[1].strip("{}"))
        ]

        def step(group, index):
            rows = address(index).reshape(-1, 4, 8)
            if (rows % 16).any() or (rows < SHARED_BASE).any():
                raise PtxError("a row of a matrix is not aligned")
            words = np.stack([read(index).reshape(-1, WARP) for read in registers], axis=1)
            halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).astype(np.uint16)
            matrices = halves.reshape(-1, 4, 8, 8)
            if "trans" in name:
                matrices = matrices.swapaxes(2, 3)
            self.machine.shared.view(np.uint16)[rows[..., None] // 2 + np.arange(8)] = matrices

        return _whole(WARP, step)


def accumulator_places(columns):
    """Return row and column of each sum of each thread, [registers, 128]."""
    register = np.arange(columns // 2)[:, None]
    row = 16 * _WARP + _LANE // 4 + 8 * (register // 2 % 2)
    return row, 8 * (register // 4) + 2 * (_LANE % 4) + register % 2


def unpack_left(words):
    """Return the bits of A[64, 16] of which each thread holds four words."""
    matrix = np.zeros((64, 16), np.uint16)
    for i in range(4):
        row = 16 * _WARP + _LANE // 4 + 8 * (i % 2)
        column = 8 * (i // 2) + 2 * (_LANE % 4)
        matrix[row, column], matrix[row, column + 1] = words[i] & 0xFFFF, words[i] >> 16
    return matrix


def spread(values, words, selector):
    """Return A[64, 32] of its kept values [64, 16] and of the metadata of each thread.

    Of every four lanes two supply metadata, which the selector chooses. Such a lane describes 16
    columns of row lane / 4 in its lower half, and of the row 8 further down in its upper half.
    """
    threads = np.arange(WARPGROUP)[selector == _LANE % 4 // 2]
    dense = np.zeros((64, 32), np.float32)
    for upper in range(2):
        row = 16 * _WARP[threads] + _LANE[threads] // 4 + 8 * upper
        bits = words[threads] >> np.uint32(16 * upper) & 0xFFFF
        for group in range(4):
            nibble = bits >> np.uint32(4 * group) & 0xF
            if (nibble & 3 >= nibble >> 2).any():
                raise PtxError("metadata that are not two rising positions")
            column = 16 * (_LANE[threads] % 2) + 4 * group
            for which, position in enumerate((nibble & 3, nibble >> 2)):
                dense[row, column + position] = values[row, column // 2 + which]
    return dense


def _to_float(bits, dtype):
    return widen_bf16(bits) if dtype == "bf16" else bits.view(np.float16).astype(np.float32)


def _descriptor(read, index):
    (bits,) = set(np.atleast_1d(read(index)).tolist())
    return Operand.unpack(bits)


def _flat(address, size):
    """A copy of bytes in a row, as a box."""
    return TensorMap(address, 4, (size // 4,), (1,), 16, (size // 4,)), (0,)


def _whole(unit, step):
    """Let an instruction wait until all threads of each warp or warpgroup are there."""

    def waiting(group, index):
        if group.covers(unit):
            return step(group, index)
        return lambda: False, f"the other threads of {unit}", True

    return waiting


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
