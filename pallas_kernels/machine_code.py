"""The machine code of a kernel for compute capability 9.0: its instructions and where they go on.

Read from a disassembly as `nvdisasm` writes it (`kernel_dumps.KernelReport.sass`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of machine code.

    Attributes:
      predicate: str, "" if it is always executed.
      opcode: str, with its modifiers, such as "LDS.64".
    """

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_certain(self) -> bool:
        """Whether it is executed whenever it is reached."""
        return self.predicate in ("", "@PT", "@UPT")

    def __str__(self) -> str:
        text = f"{self.predicate} {self.opcode} {', '.join(self.operands)}"
        return f"{self.address:#06x}: {text.strip()}"


class Program(NamedTuple):
    """A kernel in order of addresses, with the places where each instruction may go on.

    Attributes:
      code: list of Instruction; a subroutine stands there once more for each call of it.
      next: list of tuple of int, indices into `code`.
    """

    code: list[Instruction]
    next: list[tuple[int, ...]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What an opcode writes besides memory: the first operand after predicates, if that is a register;
# of some it is read instead. Other opcodes are refused: a write that is overlooked would be a
# hazard that is.
_READ_FIRST = _names(
    """
    BAR FCHK FSETP HSETP2 ISETP NANOSLEEP PLOP3 R2P R2UR RET WARPSYNC
    """
)
_WRITE_SELDOM = _names(
    """
    BRA BSSY BSYNC CALL CCTL CREDUX DEPBAR ELECT ERRBAR EXIT FENCE MEMBAR NOP RED REDG REDUX
    S2UR ST STG STL STS STSM SYNCS UBLKCP UBREV UCGABAR_ARV UCGABAR_WAIT UFLO UIADD3 UIMAD UISETP
    ULDC ULEA ULOP3 UMOV UP2UR UPLOP3 UPOPC UPRMT USEL USETMAXREG USGXT USHF UTMACCTL UTMACMDFLUSH
    UTMALDG UTMASTG VOTEU WARPGROUP YIELD
    """
)
_PREDICATES_FIRST = _names(
    """
    ATOM ATOMG ATOMS LOP3 SHFL VOTE MATCH
    """
)
_REGISTER_FIRST = _names(
    """
    BREV CS2R F2F F2FP F2I FADD FFMA FLO FMNMX FMUL FSEL FSWZADD HADD2 HFMA2 HMUL2 HMNMX2 I2F
    I2FP I2I IABS IADD3 IMAD IMNMX ISCADD LD LDC LDG LDL LDS LDSM LEA MOV MOVM MUFU P2R POPC
    PRMT S2R SEL SGXT SHF SHL SHR VIADD VIADDMNMX VIMNMX FRND LEPC DADD DMUL DFMA
    """
)
_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P[0-9T]+)?\s*([A-Z][\w.]*)\s*([^;\n]*)")
_LABEL = re.compile(r"(\.L_x_\d+|\$[\w$]+):")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)\b")
_SHARED_MEMORY = ("LDS", "LDSM", "STS", "STSM")


def parse(sass: str) -> Program:
    """Read a disassembly.

    Args:
      sass: str, as `nvdisasm` writes it for one kernel.

    Raises:
      ValueError: if there is an instruction whose effect on registers or control is not known.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := _LINE.search(line):
            address, predicate, opcode, operands = found.groups()
            code.append(Instruction(int(address, 16), predicate or "", opcode, _split(operands)))
    following = [_successors(code, i, labels) for i in range(len(code))]
    for at in [i for i, instruction in enumerate(code) if instruction.base == "CALL"]:
        _inline_call(code, following, at)
    return Program(code, following)


def _split(operands: str) -> tuple[str, ...]:
    parts = re.split(r",(?![^\[]*\])", operands.strip())
    return tuple(part.strip().removesuffix(".reuse") for part in parts if part.strip())


def _successors(code: Sequence[Instruction], at: int, labels: dict[str, int]) -> tuple[int, ...]:
    instruction = code[at]
    following = (at + 1,) if at + 1 < len(code) else ()
    always = instruction.is_certain
    if instruction.base in ("BRX", "JMP", "JMX", "BSYNC", "WARPSYNC"):
        raise ValueError(f"control of {instruction} is not known")
    if instruction.base in ("EXIT", "RET"):
        return () if always else following
    if instruction.base not in ("BRA", "CALL"):
        return following
    *conditions, target = instruction.operands
    target = labels[target.strip("`()")]
    always &= not conditions
    return (target,) if always else (target, *following)


def _inline_call(code: list[Instruction], following: list[tuple[int, ...]], at: int) -> None:
    """Append the subroutine that a call runs, and go on behind the call where it returns."""
    (target,) = following[at]
    body, todo = {target: len(code)}, [target]
    while todo:
        for i in following[todo.pop()]:
            if i not in body:
                body[i] = len(code) + len(body)
                todo.append(i)
    for i in body:
        code.append(code[i])
        if code[i].base == "CALL":
            raise ValueError(f"control of {code[i]} inside a subroutine is not known")
        returns = (at + 1,) if code[i].base == "RET" else ()
        following.append((*returns, *(body[j] for j in following[i])))
    following[at] = (body[target],)


def find_written(instruction: Instruction) -> range:
    """Return the registers that an instruction writes.

    Returns:
      range of register numbers.

    Raises:
      ValueError: if what the opcode writes is not known.
    """
    base, operands = instruction.base, list(instruction.operands)
    if base in _READ_FIRST:
        return range(0)
    if base in _PREDICATES_FIRST or base in _WRITE_SELDOM:
        while operands and re.fullmatch(r"!?U?P[0-9T]", operands[0]):
            operands.pop(0)
    elif base not in _REGISTER_FIRST:
        raise ValueError(f"what {instruction} writes is not known")
    first = re.fullmatch(r"R(\d+)", operands[0]) if operands else None
    if first is None:  # RZ, or a register that all threads share
        return range(0)
    return range(int(first.group(1)), int(first.group(1)) + _width(instruction))


def _width(instruction: Instruction) -> int:
    """Return how many registers an instruction reads or writes together."""
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.base in ("LDSM", "STSM"):
        return max((int(m) for m in modifiers if m in ("2", "4")), default=1)
    if "128" in modifiers:
        return 4
    if instruction.base == "CS2R":
        return 1 if "32" in modifiers else 2
    wide = {"64", "WIDE", "F64", "S64", "U64"} & set(modifiers)
    return 2 if wide or instruction.base in ("DADD", "DMUL", "DFMA") else 1


def find_named(instruction: Instruction) -> set[int]:
    """Return the registers that an instruction reads or writes, and perhaps neighbours.

    Returns:
      set of register numbers.
    """

    def find(text):
        # An address in shared memory is one register, however wide what stands there.
        is_narrow = text.startswith("[") and instruction.base in _SHARED_MEMORY
        width = 1 if is_narrow else _width(instruction)
        return {int(n) + i for n in _REGISTER.findall(text) for i in range(width)}

    return set().union(*map(find, instruction.operands))
