"""Ampere's instructions for `ptx_machine`: copies of a few bytes, and products of a warp.

A copy may happen at any time between where it is issued and where its thread waits for it. Both
ends are tried: bytes land at once (`copies="early"`) or at the wait ("late"), or at random.

Whoever accesses shared memory is written down, see `SharedAccesses`: what only a lucky order makes
right is an error even where the numbers are right.
"""

import dataclasses
import functools
import random
import re

import numpy as np

from tests.kernels.ptx_machine import WARP, whole
from tests.kernels.ptx_program import PtxError, split_operands
from tests.kernels.ptx_tensor_cores import (
    accumulator_places,
    decode_matrices,
    spread,
    to_float,
    unpack_left,
)
from tests.kernels.ptx_threads import ThreadUnits

# In place of a thread or of a warp.
_NOBODY, _SEVERAL = -1, -2


class SharedAccesses:
    """Who has written and who has read each byte of shared memory since the block last met.

    Threads of different warps may not access a byte that one of them writes, unless the block meets
    in between. A copy writes from its issue on: nobody may access its bytes before its thread has
    waited for it, and then no other thread before the block has met. Threads of one warp are taken
    to run in step.

    Args:
      size: int, bytes of shared memory.
    """

    def __init__(self, size):
        self.writer = np.full(size, _NOBODY, np.int16)  # Thread.
        self.reader = np.full(size, _NOBODY, np.int16)  # Warp.
        self.is_copied, self.is_flying = np.zeros(size, np.bool_), np.zeros(size, np.bool_)

    def check(self, threads, at, size, writes):
        """Write an access down; raise if another one forbids it."""
        threads, at = (x.ravel()[:, None] for x in np.broadcast_arrays(threads, at))
        places, warps = at + np.arange(size), threads // WARP
        if self.is_flying[places].any():
            raise PtxError("an access to bytes of a copy that is on its way")
        before = self.writer[places]
        is_bad = np.where(self.is_copied[places], before != threads, before // WARP != warps)
        is_bad &= before != _NOBODY
        reader = self.reader[places]
        if not writes:
            if is_bad.any():
                raise PtxError("a race: another thread has written this since the last barrier")
            self.reader[places] = np.where((reader == _NOBODY) | (reader == warps), warps, _SEVERAL)
            return
        if is_bad.any() or ((reader != _NOBODY) & (reader != warps)).any():
            raise PtxError("a race: another thread has accessed this since the last barrier")
        self.writer[places], self.is_copied[places] = threads, False

    def start_copy(self, threads, places):
        """Write down that copies of threads will write some bytes, after `check`."""
        self.is_copied[places] = self.is_flying[places] = True

    def end_copy(self, places):
        """Write down that the threads have waited for their copies."""
        self.is_flying[places] = False

    def meet(self):
        """Forget what is before a barrier, except for copies that are on their way."""
        self.reader[:] = _NOBODY
        self.writer[~self.is_flying] = _NOBODY


@dataclasses.dataclass
class Copy:
    """One instruction's copies, a row for each thread.

    Attributes:
      threads: [n].
      source: [n], offsets in global memory.
      target: [n, bytes], in shared memory.
      kept: [n], how many of the bytes are copied; the others become zero.
      group: [n], number of the thread's group.
      has_landed: whether the bytes are there already.
    """

    threads: np.ndarray
    source: np.ndarray
    target: np.ndarray
    kept: np.ndarray
    group: np.ndarray
    has_landed: bool

    def split(self, chosen):
        """Return the copies of some threads and those of the others, None for no thread."""
        if chosen.all():
            return self, None
        if not chosen.any():
            return None, self
        return tuple(
            Copy(*(x[which] for x in list(vars(self).values())[:5]), self.has_landed)
            for which in (chosen, ~chosen)
        )


class AmpereUnits:
    """The units of one block.

    Args:
      machine: Machine, with a pool for each warp.
      copies: when they happen, "early", "late" or "random".
      seed: int, of the random choice.
    """

    def __init__(self, machine, *, copies="late", seed=0):
        self.machine, self.copies, self.random = machine, copies, random.Random(seed)
        self.threads = ThreadUnits(machine, self._meet)
        self.accesses = SharedAccesses(machine.shared.size)
        machine.watch = self.accesses.check
        # Copies that are not committed, those that are, and how many groups each thread has.
        self.started, self.committed = [], []
        self.groups = np.zeros(machine.num_threads, np.int64)

    def decoders(self):
        """Return functions that decode an instruction or return None."""
        matrices = functools.partial(decode_matrices, self.machine)
        return self.threads.decode, self._copy, matrices, self._product

    def advance(self):
        """Return that nothing here goes on when no thread does: copies land where they must."""
        return False

    def check_end(self):
        """Raise if a block ends while something is on its way."""
        if left := self.started + self.committed:
            raise PtxError(f"nobody has waited for {sum(len(x.threads) for x in left)} copies")

    def _meet(self, count):
        if count != self.machine.num_threads:
            raise PtxError("barriers of a part of the block are unknown")
        self.accesses.meet()

    # Copies.

    def _copy(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[:2] != ["cp", "async"]:
            return None
        if name[2:] == ["commit_group"]:
            return self._commit
        if name[2:] in (["wait_group"], ["wait_all"]):
            left = int(operands[0], 0) if operands else 0
            return functools.partial(self._wait, left, name[2] == "wait_all")
        if not re.fullmatch(r"c[ag]\.shared(::cta)?\.global", ".".join(name[2:])):
            return None
        machine, size = self.machine, int(operands[2], 0)
        if size not in ((16,) if name[2] == "cg" else (4, 8, 16)) or len(operands) > 4:
            raise PtxError("this form of cp.async is unknown")
        target, source = machine.address(operands[0]), machine.address(operands[1])
        kept = machine.reader(operands[3] if len(operands) == 4 else str(size), "u4")

        def copy(group, index):
            self._start(group.threads, target(index), source(index), kept(index), size)

        return copy

    def _start(self, threads, target, source, kept, size):
        # Copied, as registers may change before the copies land.
        target, source, kept = (_of_all(x, len(threads)).copy() for x in (target, source, kept))
        if (kept > size).any():
            raise PtxError("a copy of more bytes than it has room for")
        if (source % size).any():
            raise PtxError("an address is not aligned")
        self.machine.check_shared(threads, target, size, True)
        # Of a source that is not read at all the address may be any.
        offsets, reads = np.zeros(len(threads), np.int64), kept > 0
        offsets[reads] = self.machine.memory.offsets(source[reads], size)
        places = target[:, None] + np.arange(size)
        self.accesses.start_copy(threads, places)
        is_early = self.copies == "early" or (
            self.copies == "random" and self.random.random() < 0.5
        )
        copy = Copy(threads, offsets, places, kept, np.zeros(len(threads), np.int64), is_early)
        if is_early:
            self._land(copy)
        self.started.append(copy)

    def _land(self, copy):
        at = np.arange(copy.target.shape[1])
        bytes_ = self.machine.memory.bytes[copy.source[:, None] + at]
        self.machine.shared[copy.target] = np.where(at < copy.kept[:, None], bytes_, 0)

    def _commit(self, group, index):
        here = self._mask(group)
        others = []
        for copy in self.started:
            mine, other = copy.split(here[copy.threads])
            if mine is not None:
                mine.group = self.groups[mine.threads]
                self.committed.append(mine)
            others += [other] if other is not None else []
        self.started = others
        self.groups[group.threads] += 1

    def _wait(self, left, with_started, group, index):
        if with_started:
            self._commit(group, index)
        over = np.full(self.machine.num_threads, -1)
        over[group.threads] = self.groups[group.threads] - left
        others = []
        for copy in self.committed:
            mine, other = copy.split(copy.group < over[copy.threads])
            if mine is not None:
                if not mine.has_landed:
                    self._land(mine)
                self.accesses.end_copy(mine.target)
            others += [other] if other is not None else []
        self.committed = others

    def _mask(self, group):
        here = np.zeros(self.machine.num_threads, np.bool_)
        here[group.threads] = True
        return here

    # Products.

    def _product(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[0] != "mma":
            return None
        form = re.fullmatch(
            r"mma\.(sp::ordered_metadata\.sync\.aligned\.m16n8k32|sync\.aligned\.m16n8k16)"
            r"\.row\.col\.f32\.(bf16|f16)\.\2\.f32",
            instruction.opcode,
        )
        if form is None:
            raise PtxError("this product is unknown")
        is_sparse, dtype = "sp::ordered_metadata" in name, form[2]
        machine, parts = self.machine, [split_operands(x.strip("{}")) for x in operands[:4]]
        if [len(x) for x in parts] != [4, 4, 4 if is_sparse else 2, 4]:
            raise PtxError("a fragment of another size")
        results = [machine.writer(x, "f4") for x in parts[0]]
        left, right = ([machine.reader(x, "u4") for x in part] for part in parts[1:3])
        sums = [machine.reader(x, "f4") for x in parts[3]]
        word, selector = None, None
        if is_sparse:
            word, selector = machine.reader(operands[4], "u4"), int(operands[5], 0)
        if len(operands) != (6 if is_sparse else 4):
            raise PtxError(f"{len(operands)} operands")

        def multiply(group, index):
            count = len(group.threads)
            a = to_float(unpack_left([_of_all(read(index), count) for read in left]), dtype)
            if is_sparse:
                a = spread(a, _of_all(word(index), count), selector)
            b = to_float(unpack_right([_of_all(read(index), count) for read in right]), dtype)
            product = (a.reshape(len(b), 16, -1) @ b).reshape(-1, 8)
            row, column = accumulator_places(8, count)
            for i in range(4):
                # All sums are read before: registers of results may be those of operands.
                product[row[i], column[i]] += sums[i](index)
            for i in range(4):
                results[i](index, product[row[i], column[i]])

        return whole(WARP, multiply)


def unpack_right(words):
    """Return the bits of B[warps, 8 * words, 8] of which each thread holds some words."""
    halves = np.stack(words).astype(np.uint32).view(np.uint16)
    return halves.reshape(-1)[_right_places(len(words[0]), len(words))]


@functools.cache
def _right_places(num_threads, count):
    """Return where B has each of its elements, in the halves of words [count, threads]."""
    warp, row, column = np.indices((num_threads // WARP, 8 * count, 8))
    thread = WARP * warp + 4 * column + row % 8 // 2
    return 2 * (row // 8 * num_threads + thread) + row % 2


def _of_all(values, count):
    return values if len(values) == count else np.repeat(values, count)
