"""What comes between the asynchronous products of a Hopper kernel and the waits that cover them.

Tensor-core products of a warpgroup (`wgmma`, HGMMA in machine code) run beside the instructions
that follow. They are committed in groups, and a wait for all but the last n groups ends the others.
Until then they read registers (left operands, metadata of sparse ones) and shared memory, and write
sums. Neither ptxas nor the interpreter of Pallas checks that nothing comes in between. Here every
path of the machine code is followed, around loops too, with the groups in flight on it.

Registers are followed, memory is not: which slot a barrier stands for, or an address, is not known.
Registers that all threads share (UR) are taken to be read when a product is started. That a fence
comes between writes to registers and the products that read them is left to ptxas's remarks.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from pallas_kernels.machine_code import Instruction, Program, find_named, find_written


class Group(NamedTuple):
    """Products that are committed together.

    Attributes:
      reads: registers of left operands and metadata.
      sums: registers that are added to.
    """

    reads: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()


class Loop(NamedTuple):
    """An innermost loop that multiplies.

    Attributes:
      products: int, tensor-core instructions of one turn.
      groups: int, groups that it commits.
      waits: tuple of int, for each wait, how many groups may stay in flight.
      arrivals: tuple of int, for each arrival at a barrier in shared memory, how many groups may be
        in flight.
      exponentials: tuple of int, how many instructions compute them, and how many of these while a
        group is in flight on every path.
      instructions: int, of one turn, loops inside it (of threads that wait) left out; all branches
        counted.
    """

    products: int
    groups: int
    waits: tuple[int, ...]
    arrivals: tuple[int, ...]
    exponentials: tuple[int, int]
    instructions: int


# Without a wait, a loop would start groups for ever.
_MOST_IN_FLIGHT = 4


class _State(NamedTuple):
    open: Group
    pending: tuple[Group, ...]
    unfenced: bool


def find_hazards(program: Program, *, in_flight_at_release: int = 0) -> list[str]:
    """Find what comes between asynchronous products and the waits that cover them.

    Args:
      in_flight_at_release: int, how many groups may be in flight where a warpgroup arrives at a
        barrier in shared memory, which is how it gives back what they read: those that read
        something else.

    Returns:
      list of str, one for each instruction that writes a register which a product in flight reads;
      reads or writes a sum in flight; starts a product, or a copy to global memory, that may not
      see what was stored to shared memory before; arrives at a barrier too early; or ends the
      program while a product is in flight.
    """
    found: dict[str, None] = {}
    for at, state in _follow(program):
        found |= dict.fromkeys(_check(program.code[at], state, in_flight_at_release))
    return list(found)


def count_groups(program: Program) -> set[int]:
    """Return the sizes that groups of products have, on any path.

    Returns:
      set of int, tensor-core instructions of a group.
    """
    sizes: set[int] = set()
    seen, todo = {(0, 0)}, [(0, 0)]
    while todo:
        at, size = todo.pop()
        instruction = program.code[at]
        if instruction.base == "HGMMA":
            size += 1
            if "gsb0" in instruction.operands:
                sizes.add(size)
                size = 0
        for following in program.next[at]:
            if (following, size) not in seen:
                seen.add((following, size))
                todo.append((following, size))
    return sizes


def count_groups_asked_for(ptx: str) -> set[int]:
    """Return the sizes of groups that a program asks for.

    Args:
      ptx: str, in which products and their commit stand in one block, as compilers leave them.

    Returns:
      set of int, tensor-core instructions of a group.
    """
    sizes, size = set(), 0
    for name in re.findall(r"wgmma\.(mma_async|commit_group)", ptx):
        if name == "mma_async":
            size += 1
        elif size:
            sizes.add(size)
            size = 0
    return sizes


def find_loops(program: Program) -> list[Loop]:
    """Find the innermost loops that multiply, and count what one turn of them does.

    Returns:
      list of Loop, in order of addresses.
    """
    bodies = _natural_loops(program)
    in_flight: dict[int, set[int]] = {}
    for at, state in _follow(program):
        in_flight.setdefault(at, set()).add(len(state.pending) + bool(state.open.sums))
    loops = []
    for head, body in sorted(bodies.items()):
        inner = [other for h, other in bodies.items() if h != head and other < body]
        if any(_multiplies(program, other) for other in inner):
            continue
        places = sorted(body.difference(*inner))
        own = [program.code[i] for i in places]
        products = [x for x in own if x.base == "HGMMA"]
        if products:
            waits = tuple(n for x in own if (n := _wait(x)) is not None)
            groups = sum("gsb0" in x.operands for x in products)
            arrivals = tuple(max(in_flight[i]) for i in places if _arrives(program.code[i]))
            beside = [min(in_flight[i]) > 0 for i in places if _is_exponential(program.code[i])]
            exponentials = len(beside), sum(beside)
            loops.append(Loop(len(products), groups, waits, arrivals, exponentials, len(own)))
    return loops


def _follow(program: Program) -> Iterator[tuple[int, _State]]:
    """Follow every path: each instruction with each state in which it is reached."""
    todo: list[tuple[int, _State]] = [(0, _State(Group(), (), False))]
    seen = set(todo)
    while todo:
        at, state = todo.pop()
        yield at, state
        state = _step(program.code[at], state)
        for following in program.next[at]:
            if (following, state) not in seen:
                seen.add((following, state))
                todo.append((following, state))


def _arrives(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("SYNCS.ARRIVE")


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("MUFU.EX2")


def _product(instruction: Instruction) -> Group:
    """Return what an HGMMA reads and adds to."""
    if not instruction.is_certain:
        raise ValueError(f"whether {instruction} is started is not known")
    operands = [x for x in instruction.operands if x != "gsb0"]
    if operands[0] == "RZ":  # a product that ptxas makes up, to wait for it
        return Group()
    shape = re.search(r"\.64x(\d+)x\d+\.F32", instruction.opcode)
    if shape is None:
        raise ValueError(f"the sums of {instruction} are of an unknown kind")
    first = int(operands[0].removeprefix("R"))
    sums = frozenset(range(first, first + int(shape.group(1)) // 2))
    reads: set[int] = set()
    if (left := re.fullmatch(r"R(\d+)", operands[1])) is not None:
        # 64 rows of 16 or 32 values of 16 bits, four threads a row.
        reads |= set(range(int(left.group(1)), int(left.group(1)) + 4))
    if ".SP." in instruction.opcode:
        reads.add(int(operands[-2].removeprefix("R")))
    return Group(frozenset(reads), sums)


def _wait(instruction: Instruction) -> int | None:
    """Return how many groups may stay in flight, if the instruction waits for groups."""
    if instruction.base != "WARPGROUP" or ".DEPBAR" not in instruction.opcode:
        return None
    if not instruction.is_certain or instruction.operands[0] != "gsb0":
        raise ValueError(f"what {instruction} waits for is not known")
    return int(instruction.operands[1], 16)


def _step(instruction: Instruction, state: _State) -> _State:
    if instruction.base == "HGMMA":
        product = _product(instruction)
        group = Group(*(a | b for a, b in zip(state.open, product, strict=True)))
        if "gsb0" not in instruction.operands:
            return state._replace(open=group)
        return state._replace(open=Group(), pending=(*state.pending, group)[-_MOST_IN_FLIGHT:])
    if (left := _wait(instruction)) is not None:
        return state._replace(pending=state.pending[len(state.pending) - left :] if left else ())
    if instruction.base in ("STS", "STSM"):
        return state._replace(unfenced=True)
    if instruction.opcode.startswith("FENCE.VIEW.ASYNC") and instruction.is_certain:
        return state._replace(unfenced=False)
    return state


def _check(instruction: Instruction, state: _State, in_flight_at_release: int) -> Iterator[str]:
    running = [*state.pending, state.open]
    if instruction.base == "HGMMA":
        product = _product(instruction)
        if len(state.pending) == _MOST_IN_FLIGHT:
            yield f"{instruction} starts while {_MOST_IN_FLIGHT} groups are in flight"
        if any(product.reads & group.sums for group in running):
            yield f"{instruction} reads a sum in flight"
        if any(product.sums & group.reads for group in running):
            yield f"{instruction} adds to a register that a product in flight reads"
        return
    if instruction.base in ("UTMASTG", "UBLKCP") and state.unfenced:
        yield f"{instruction} may not see what was stored before: a proxy fence is missing"
    written = set(find_written(instruction))
    if any(group.reads & written for group in running):
        yield f"{instruction} writes a register that a product in flight reads"
    if any(group.sums & find_named(instruction) for group in running):
        yield f"{instruction} touches a sum in flight"
    if _arrives(instruction) and len(state.pending) + bool(state.open.sums) > in_flight_at_release:
        yield (
            f"{instruction} arrives at a barrier with {len(state.pending)} groups in flight, "
            f"of which {in_flight_at_release} may read something else"
        )
    if instruction.base == "EXIT" and any(group.sums for group in running):
        yield f"{instruction} ends the program with products in flight"


def _multiplies(program: Program, body: frozenset[int]) -> bool:
    return any(program.code[i].base == "HGMMA" for i in body)


def _natural_loops(program: Program) -> dict[int, frozenset[int]]:
    """Return the instructions of each loop by its head."""
    dominators = _dominators(program)
    before = _predecessors(program)
    bodies: dict[int, set[int]] = {}
    for at, following in enumerate(program.next):
        for head in following:
            if head not in dominators.get(at, ()):
                continue
            body = bodies.setdefault(head, {head})
            todo = [at]
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before[i]
    return {head: frozenset(body) for head, body in bodies.items()}


def _predecessors(program: Program) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in program.code]
    for at, following in enumerate(program.next):
        for i in following:
            before[i].append(at)
    return before


def _dominators(program: Program) -> dict[int, set[int]]:
    """Return for each instruction that is reached, the block heads on every way to it and itself.

    Only heads of blocks can be targets of a branch, so only these are kept.
    """
    before = _predecessors(program)
    heads = {0} | {
        i for i, ways in enumerate(before) if len(ways) > 1 or (ways and ways != [i - 1])
    }
    order, seen = [], {0}
    todo = [0]
    while todo:
        at = todo.pop()
        order.append(at)
        for following in program.next[at]:
            if following not in seen:
                seen.add(following)
                todo.append(following)
    result: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for at in sorted(order):
            if at == 0:
                continue
            known = [result[i] for i in before[at] if i in result]
            if not known:
                changed = True
                continue
            new = set.intersection(*known) | ({at} if at in heads else set())
            if result.get(at) != new:
                result[at] = new
                changed = True
    return result
