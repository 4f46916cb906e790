"""Tensor cores of Hopper for `ptx_machine`, and the instructions that move their matrices.

A product may read memory, metadata and registers, and add to its sums, at any time between where it
is issued and where its group is waited for: `reads="early"` and "late" are the two ends.
"""

import dataclasses
import functools
import re

import numpy as np

from tests.kernels.ptx_arithmetic import widen_bf16
from tests.kernels.ptx_machine import SHARED_BASE, WARP, WARPGROUP, whole
from tests.kernels.ptx_program import PtxError, split_operands


def swizzle(address, size):
    """Return where memory has a byte: chunks of 16 bytes change places by rows of 128 bytes."""
    mask = {128: 7, 64: 3, 32: 1, 16: 0}[size]
    return address ^ ((address >> 7 & mask) << 4)


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


@dataclasses.dataclass
class Products:
    """Tensor-core instructions of one warpgroup: not committed, and committed groups."""

    started: list = dataclasses.field(default_factory=list)
    groups: list = dataclasses.field(default_factory=list)


class TensorCores:
    """Those of one block."""

    def __init__(self, machine, reads):
        self.machine, self.reads, self.products = machine, reads, {}

    def decoders(self):
        """Return functions that decode an instruction or return None."""
        return self._wgmma, functools.partial(decode_matrices, self.machine)

    def check_end(self):
        """Raise if a block ends while something is on its way."""
        for products in self.products.values():
            if products.started or products.groups:
                raise PtxError("products are on their way at the end")

    def _wgmma(self, instruction):
        name, operands = instruction.name, instruction.operands
        if name[0] != "wgmma":
            return None
        if name[1] == "fence":
            return whole(WARPGROUP, lambda group, index: None)
        if name[1] == "commit_group":

            def commit(group, index):
                for products in self._products(group):
                    products.groups.append(products.started)
                    products.started = []

            return whole(WARPGROUP, commit)
        if name[1] == "wait_group":

            def wait(group, index):
                for products in self._products(group):
                    while len(products.groups) > int(operands[0]):
                        for product in products.groups.pop(0):
                            product()

            return whole(WARPGROUP, wait)
        return whole(WARPGROUP, self._multiply(instruction)) if name[1] == "mma_async" else None

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
                    a = to_float(unpack_left(words), dtype)
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
        return to_float(self.machine.async_shared.view(np.uint16)[places // 2], dtype)


def decode_matrices(machine, instruction):
    """`stmatrix` and `ldmatrix`: matrices of 8 by 8, a row at the address of each lane."""
    name, operands = instruction.name, instruction.operands
    if name[0] not in ("stmatrix", "ldmatrix"):
        return None
    plain = instruction.opcode.replace(".trans", "").replace("shared::cta", "shared")
    form = re.fullmatch(rf"{name[0]}\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", plain)
    is_store, turns = name[0] == "stmatrix", "trans" in name
    place, data = operands if is_store else operands[::-1]
    address = machine.address(place)
    access = machine.reader if is_store else machine.writer
    registers = [access(x, "u4") for x in split_operands(data.strip("{}"))]
    if form is None or len(registers) != int(form[1]):
        raise PtxError("this form is unknown")
    lanes = 8 * len(registers)

    def step(group, index):
        # Further lanes give addresses that nobody reads.
        rows = address(index).reshape(-1, WARP)[:, :lanes]
        machine.check_shared(group.threads.reshape(-1, WARP)[:, :lanes], rows, 16, is_store)
        places = rows.reshape(-1, len(registers), 8, 1) // 2 + np.arange(8)
        memory = machine.shared.view(np.uint16)
        if is_store:
            memory[places] = as_matrices([read(index) for read in registers], turns)
            return
        for write, values in zip(registers, as_words(memory[places], turns), strict=True):
            write(index, values)

    return whole(WARP, step)


@functools.cache
def accumulator_places(columns, num_threads=WARPGROUP):
    """Return row and column of each sum of each thread, [registers, threads]."""
    register, thread = np.arange(columns // 2)[:, None], np.arange(num_threads)
    row = 16 * (thread // WARP) + thread % WARP // 4 + 8 * (register // 2 % 2)
    return row, 8 * (register // 4) + 2 * (thread % 4) + register % 2


def unpack_left(words):
    """Return the bits of A[16 * warps, 16] of which each thread holds four words."""
    halves = np.stack(words).astype(np.uint32).view(np.uint16)
    return halves.reshape(-1)[_left_places(len(words[0]))]


@functools.cache
def _left_places(num_threads):
    """Return where A has each of its elements, in the halves of words [4, threads]."""
    row, column = np.indices((num_threads // 2, 16))
    thread = WARP * (row // 16) + 4 * (row % 8) + column % 8 // 2
    word = row % 16 // 8 + 2 * (column // 8)
    return 2 * (word * num_threads + thread) + column % 2


def spread(values, words, selector):
    """Return A[16 * warps, 32] of its kept values [.., 16] and of the metadata of each thread.

    Of every four lanes two supply metadata, which the selector chooses. Such a lane describes 16
    columns of row lane / 4 in its lower half, and of the row 8 further down in its upper half.
    """
    threads, row, kept, column = _described(len(words), selector)
    halves = words[threads] >> np.array([[0], [16]], np.uint32)
    nibbles = halves[..., None] >> 4 * np.arange(4, dtype=np.uint32) & 0xF
    positions = np.stack([nibbles & 3, nibbles >> 2], axis=-1)
    if (positions[..., 0] >= positions[..., 1]).any():
        raise PtxError("metadata that are not two rising positions")
    dense = np.zeros((len(words) // 2, 32), np.float32)
    dense[row, column + positions] = values[row, kept]
    return dense


@functools.cache
def _described(num_threads, selector):
    """Return what threads supply, and of each of it [halves, threads, groups, 2]: row and columns.

    The columns are those of the kept value, and of the first of the four that it may be in.
    """
    if selector not in (0, 1):
        raise PtxError(f"the selector {selector}")
    threads = np.arange(num_threads)
    threads = threads[threads % 4 // 2 == selector]
    row = 16 * (threads // WARP) + threads % WARP // 4 + np.array([[0], [8]])
    part, group = threads[:, None, None] % 2, np.arange(4)[:, None]
    return threads, row[..., None, None], 8 * part + 2 * group + [0, 1], 16 * part + 4 * group


def as_matrices(words, turns):
    """Return matrices [warps, count, 8, 8] of words of each thread, two neighbours in each."""
    words = np.stack([word.reshape(-1, WARP) for word in words], axis=1)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).astype(np.uint16)
    matrices = halves.reshape(*words.shape[:2], 8, 8)
    return matrices.swapaxes(2, 3) if turns else matrices


def as_words(matrices, turns):
    """Return words of each thread of matrices [warps, count, 8, 8], one for each matrix."""
    matrices = matrices.swapaxes(2, 3) if turns else matrices
    halves = matrices.reshape(*matrices.shape[:2], WARP, 2).astype(np.uint32)
    words = halves[..., 0] | halves[..., 1] << 16
    return [words[:, i].ravel() for i in range(words.shape[1])]


def to_float(bits, dtype):
    """Return the float32 values of bits of bf16 or f16."""
    return widen_bf16(bits) if dtype == "bf16" else bits.view(np.float16).astype(np.float32)


def _descriptor(read, index):
    (bits,) = set(np.atleast_1d(read(index)).tolist())
    return Operand.unpack(bits)
