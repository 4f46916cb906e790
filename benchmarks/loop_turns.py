"""What a warp executes in one turn of the loop that multiplies, read from the machine code.

A disassembly with control codes tells more than the instructions: how many clocks the warp waits
after each, on which scoreboards it waits before, and which it sets. From these, the units that
instructions occupy, and the shapes of products a turn can be timed (`benchmarks.cycle_model`).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.machine_code import Instruction, Program, find_written, parse

# Control codes stand before the address: scoreboards waited for, set when operands have been read,
# set when the result is there, whether another warp may take over, and clocks until the next.
_CONTROL = re.compile(r"\s*(\S+):(\d|-):(\d|-):[Y-]:(\d+)\s+/\*([0-9a-f]+)\*/")
_SHAPE = re.compile(r"\.64x(\d+)x(\d+)\.")
_ANY_REGISTER = re.compile(r"\bU?R\d+")
_BOTH_WARPGROUPS = "0x100"

# Clocks that a warp instruction occupies its unit of one of the four quarters of a processor: 32
# threads over the results per clock that the CUDA C++ Programming Guide ("Throughput of Native
# Arithmetic Instructions", compute capability 9.0) has for a processor, of which a quarter has a
# quarter. The path to shared memory takes 32 words per clock from all quarters.
_HALF_RATE = (
    *("F2FP", "FMNMX", "FSEL", "FSETP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "PRMT", "SEL"),
    *("SHF", "VIADD", "VIMNMX"),
)
_UNITS = {
    **dict.fromkeys(("FADD", "FFMA", "FMUL"), ("fma", 1)),
    **dict.fromkeys(_HALF_RATE, ("alu", 2)),
    "MUFU": ("mufu", 8),
    **dict.fromkeys(("LDS", "LDSM", "SHFL", "STS", "STSM"), ("lsu", 4)),
}
_GLOBAL_READS = ("LD", "LDG")
# Of one register to another, also as the sum of a product that is zero.
_MOVES = ("MOV", "IMAD.MOV.U32", "IMAD.U32")


class Control(NamedTuple):
    """The control codes of an instruction.

    Attributes:
      waits: scoreboards that must be clear before it is issued.
      until_read: scoreboard that it holds until its operands are read, or None.
      until_done: scoreboard that it holds until its result is there, or None.
      stall: int, clocks until the warp may issue the next.
    """

    waits: tuple[int, ...] = ()
    until_read: int | None = None
    until_done: int | None = None
    stall: int = 1


class Product(NamedTuple):
    """A product of tensor cores by a warpgroup, 64 rows.

    Attributes:
      columns: int, of the result.
      contraction: int; of a sparse left operand, zeros counted.
      is_sparse: bool, half of the left operand is zeros that are not stored.
      reads_left: bool, the left operand is read from shared memory.
    """

    columns: int
    contraction: int
    is_sparse: bool
    reads_left: bool

    @property
    def flops(self) -> int:
        """Floating-point operations, those with zeros counted."""
        return 2 * 64 * self.columns * self.contraction

    @property
    def shared_bytes(self) -> int:
        """Bytes of 16-bit operands that are read from shared memory."""
        left = 64 * self.contraction // (2 if self.is_sparse else 1)
        return 2 * (self.columns * self.contraction + left * self.reads_left)


class Issue(NamedTuple):
    """An instruction of a turn, as far as time depends on it.

    Attributes:
      base: str, opcode without modifiers.
      unit: str, what it occupies besides an issue slot, "" if nothing.
      unit_clocks: int, for how long.
      is_global_read: bool, it reads global memory.
      product: Product, if it starts one.
      commits: bool, it ends a group of products.
      in_flight: int, if it waits until at most so many groups are in flight.
      arrives: bool, it tells the other warpgroup that it may go on.
      meets: bool, it waits for the other warpgroup to arrive once more.
      is_mutual: bool, it waits where its own warpgroup has arrived as well.
    """

    base: str
    control: Control = Control()
    unit: str = ""
    unit_clocks: int = 0
    is_global_read: bool = False
    product: Product | None = None
    commits: bool = False
    in_flight: int | None = None
    arrives: bool = False
    meets: bool = False
    is_mutual: bool = False


type Turn = tuple[Issue, ...]
"""What a warp issues in one turn of a loop, every wait ending at once."""


class MainLoop(NamedTuple):
    """The loop of a kernel that multiplies.

    Attributes:
      turn: what a computing warp issues in one turn.
      is_repeated: bool, it stands in another loop: the program stays, and goes from tile to tile.
    """

    turn: Turn
    is_repeated: bool


def read_main_loop(sass: str, number: int = 0) -> MainLoop:
    """Read the main loop of a kernel: of innermost loops, that with most products.

    Of loops with equally many the shorter one is taken, which is the one without a mask. Branches
    within a turn are taken as not taken, so that all that may be skipped is counted.

    Args:
      sass: str, of `pallas_kernels.aot.KernelReport`.
      number: int, how many loops with more products are passed over.

    Raises:
      ValueError: if no loop multiplies, or too few do.
    """
    program, controls = parse(sass), _read_controls(sass)
    loops = list(_find_loops(program))
    if len(loops) <= number:
        raise ValueError(f"{len(loops) or 'no'} loops of the kernel multiply, wanted {number + 1}")
    loops.sort(key=lambda loop: (-_count_products(loop[0]), len(loop[0])))
    path, is_repeated = loops[number]
    exchanges = _find_exchanges(path)
    turn = tuple(_describe(x, controls[x.address], exchanges, i) for i, x in enumerate(path))
    return MainLoop(turn, is_repeated)


def _read_controls(sass: str) -> dict[int, Control]:
    controls = {}
    for line in sass.splitlines():
        if found := _CONTROL.match(line):
            waits, *held, stall, address = found.groups()
            until_read, until_done = (None if text == "-" else int(text) for text in held)
            control = Control(_read_mask(waits), until_read, until_done, int(stall))
            controls[int(address, 16)] = control
    return controls


def _read_mask(text: str) -> tuple[int, ...]:
    """Return the scoreboards of "-", "2", "3&1" or "0x1c"."""
    if text == "-":
        return ()
    if text.startswith("0x"):
        return tuple(bit for bit in range(6) if int(text, 16) >> bit & 1)
    return tuple(int(part) for part in text.split("&"))


def _find_loops(program: Program) -> Iterator[tuple[list[Instruction], bool]]:
    """Yield a turn of each innermost loop that multiplies, and whether it is in another loop."""
    edges = [
        (head, last)
        for last, following in enumerate(program.next)
        for head in following
        if head <= last and _count_products(program.code[head : last + 1])
    ]
    # Places where a barrier is not ready stand far behind the loop and jump back into it.
    turns = {edge: turn for edge in edges if (turn := _follow(program, *edge))}
    for (head, last), turn in turns.items():
        if not any((h, e) != (head, last) and head <= h and e <= last for h, e in turns):
            yield turn, _comes_back(program, head, last)


def _comes_back(program: Program, head: int, last: int) -> bool:
    """Whether a program that has left a loop at its end may enter it again."""
    todo = [at for at in program.next[last] if at != head]
    seen = set(todo)
    while todo:
        for at in program.next[todo.pop()]:
            if at not in seen:
                seen.add(at)
                todo.append(at)
    return head in seen


def _count_products(code: Sequence[Instruction]) -> int:
    return sum(x.base == "HGMMA" for x in code)


def _follow(program: Program, head: int, last: int) -> list[Instruction] | None:
    """Return the instructions of one turn, branches not taken where that is possible.

    Returns:
      list of Instruction, or None if this way does not lead to the last one.
    """
    path, at = {}, head
    while head <= at <= last and at not in path:
        path[at] = program.code[at]
        following = program.next[at]
        if at == last:
            return list(path.values())
        if not following:
            return None
        at = at + 1 if at + 1 in following else following[0]
    return None


class _Exchanges(NamedTuple):
    """Where on a path the two warpgroups speak to each other: indices."""

    arrivals: set[int]
    meetings: set[int]
    is_mutual: bool


def _find_exchanges(path: Sequence[Instruction]) -> _Exchanges:
    """Find where the two warpgroups arrive at barriers of theirs, and where they wait at them.

    In shared memory those are barriers at an address that the loop does not change; the slots of a
    ring go around. Of numbered barriers those of 256 threads.
    """
    written = set(_find_written(path))
    arrivals, meetings = (
        {
            i: address
            for i, x in enumerate(path)
            if x.opcode.startswith(f"SYNCS.{kind}")
            and not written & set(_ANY_REGISTER.findall(address := _find_address(path, i)))
        }
        for kind in ("ARRIVE", "PHASECHK.TRANS64.TRYWAIT")
    )
    if not arrivals or not meetings:
        arrivals = meetings = {}
    numbered = {
        i: ".ARV" in x.opcode
        for i, x in enumerate(path)
        if x.base == "BAR" and x.operands[-1] == _BOTH_WARPGROUPS
    }
    is_mutual = set(arrivals.values()) == set(meetings.values()) and not any(numbered.values())
    synchronized = {i for i, only_arrives in numbered.items() if not only_arrives}
    return _Exchanges(
        arrivals.keys() | (synchronized if is_mutual else numbered.keys() - synchronized),
        meetings.keys() | synchronized,
        is_mutual,
    )


def _find_address(path: Sequence[Instruction], place: int) -> str:
    """Return the address of a barrier; for a register that it was moved to, where it came from."""
    address = path[place].operands[-2]
    name = re.match(r"\[(R\d+)\b", address)
    writers = [x for x in path[:place] if name and x.operands and x.operands[0] == name[1]]
    if name and writers and writers[-1].opcode in _MOVES:
        sources = [x for x in writers[-1].operands[1:] if x != "RZ"]
        if len(sources) == 1:
            return address.replace(name[1], sources[0], 1)
    return address


def _find_written(path: Sequence[Instruction]) -> Iterator[str]:
    """Yield the registers that a path writes, those that all threads share too."""
    for x in path:
        if x.base != "HGMMA":
            yield from (f"R{number}" for number in find_written(x))
        shared = re.fullmatch(r"UR(\d+)", x.operands[0]) if x.operands else None
        if shared and not x.base.startswith("UTMA"):
            is_wide = not {"64", "WIDE"}.isdisjoint(x.opcode.split("."))
            yield from (f"UR{int(shared[1]) + i}" for i in range(1 + is_wide))


def _describe(x: Instruction, control: Control, exchanges: _Exchanges, place: int) -> Issue:
    unit, clocks = _UNITS.get(x.base, ("", 0))
    if unit == "lsu":
        clocks *= _count_words(x)
    in_flight = None
    if x.base == "WARPGROUP" and ".DEPBAR" in x.opcode:
        in_flight = int(x.operands[1], 16)
    return Issue(
        base=x.base,
        control=control,
        unit=unit,
        unit_clocks=clocks,
        is_global_read=x.base in _GLOBAL_READS,
        product=_read_product(x),
        commits="gsb0" in x.operands and x.base == "HGMMA",
        in_flight=in_flight,
        arrives=place in exchanges.arrivals,
        meets=place in exchanges.meetings,
        is_mutual=place in exchanges.meetings and exchanges.is_mutual,
    )


def _count_words(x: Instruction) -> int:
    """Return how many words of 32 bits a thread moves."""
    modifiers = x.opcode.split(".")
    if x.base in ("LDSM", "STSM"):
        return next((int(m) for m in modifiers if m in ("2", "4")), 1)
    bits = [int(m) for m in modifiers if m in ("64", "128")]
    return math.ceil(max(bits, default=32) / 32)


def _read_product(x: Instruction) -> Product | None:
    if x.base != "HGMMA" or x.operands[0] == "RZ":
        return None
    found = _SHAPE.search(x.opcode + ".")
    if found is None:
        raise ValueError(f"the shape of {x} is not known")
    return Product(
        columns=int(found[1]),
        contraction=int(found[2]),
        is_sparse=".SP." in x.opcode,
        reads_left=not re.fullmatch(r"R\d+", x.operands[1]),
    )
