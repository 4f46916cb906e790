"""PTX taken apart: instructions, labels, registers and parameters of one kernel."""

import dataclasses
import re

import numpy as np

_REGISTER_TYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


class PtxError(Exception):
    """What a program may not do, or what the machine does not know."""


@dataclasses.dataclass
class Instruction:
    """One instruction as text, taken apart.

    Attributes:
      text: str, the whole line.
      predicate: (register, whether it is negated) or None.
      name: list of str, parts of the name between dots.
      operands: list of str.
    """

    text: str
    predicate: tuple[str, bool] | None
    name: list[str]
    operands: list[str]

    @property
    def opcode(self):
        """The whole name."""
        return ".".join(self.name)


@dataclasses.dataclass
class Program:
    """A kernel taken apart.

    Attributes:
      labels: of each, the index of the instruction behind it.
      cluster: int, blocks of a cluster.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    register_types: dict[str, type]
    params: list[str]
    num_threads: int
    cluster: int = 1


def split_operands(text):
    """Split at commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(ptx):
    """Take a kernel's PTX apart. Names declared in a block in braces are made its own.

    Args:
      ptx: str, one entry.

    Returns:
      Program.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    head, _, body = text.partition(".visible .entry")[2].partition("\n{")
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*1)*\s*(?:\.|$)", head)
    program = Program([], {}, {}, re.findall(r"(\w+_param_\d+)", head), int(threads[1]))
    if cluster := re.search(r"\.reqnctapercluster (\d+), 1, 1\b", head):
        program.cluster = int(cluster[1])
    scopes, pos, count = [{}], 0, 0
    token = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;]+);)")
    declared = re.compile(r"\.reg \.(\w+)\s+(.*)", re.DOTALL)

    def rename(match):
        for scope in reversed(scopes):
            if match[0] in scope:
                return scope[match[0]]
        return match[0]

    while match := token.match(body, pos):
        pos = match.end()
        brace, label, statement = match.groups()
        if brace == "{":
            count += 1
            # Labels may be used before they stand there.
            inner = body[pos : body.index("}\n", pos)]
            names = re.findall(r"(?m)^\s*([$\w]+):(?!:)", inner)
            scopes.append({name: f"{name}@{count}" for name in names})
        elif brace == "}":
            scopes.pop()
            if not scopes:
                break
        elif label:
            program.labels[scopes[-1].get(label, label)] = len(program.instructions)
        elif found := declared.match(statement := statement.strip()):
            kind = _REGISTER_TYPES[found[1].replace("u", "b").replace("s", "b").replace("f", "b")]
            for name in (name.strip() for name in found[2].split(",")):
                if ranged := re.fullmatch(r"(\S+)<(\d+)>", name):
                    for i in range(int(ranged[2])):
                        program.register_types[f"{ranged[1]}{i}"] = kind
                else:
                    scopes[-1][name] = f"{name}@{count}"
                    program.register_types[f"{name}@{count}"] = kind
        elif statement.startswith((".shared", ".pragma")):
            continue
        elif statement.startswith("."):
            raise PtxError(f"unknown directive: {statement}")
        else:
            statement = re.sub(r"[$%\w]+", rename, " ".join(statement.split()))
            guard, predicate = re.match(r"@(!?)(\S+)\s+", statement), None
            if guard:
                predicate, statement = (guard[2], bool(guard[1])), statement[guard.end() :]
            name, _, rest = statement.partition(" ")
            program.instructions.append(
                Instruction(match[3].strip(), predicate, name.split("."), split_operands(rest))
            )
    return program
