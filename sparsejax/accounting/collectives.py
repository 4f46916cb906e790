"""What devices exchange in one call of a compiled program, read from its text.

Loops count as often as they go round, where XLA knows how often that is, once otherwise. Branches
count as if each were taken. Bytes are those that one device sends, where devices pass parts around
a ring, as NCCL's do: of an array of S bytes in n parts,

  all-gather, reduce-scatter   S (n - 1) / n
  all-reduce                   twice that: the one and then the other
  all-to-all                   S (n - 1) / n, of the S that a device holds
  collective-permute           S

A ring goes through all devices of a host before it leaves it. So of g of its devices on a host one
sends to another host: 1 / g of the bytes, if each device is to send its share.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""What devices exchange, by XLA's names."""

_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLERS = ("while", "conditional", "call", "fusion", "async-start")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`, by XLA's name.
      whole_bytes: of the whole array that each group of devices gathers, sums or exchanges; of an
        all-to-all, of what one device holds.
      axes: of the mesh, along which the devices of a group differ.
      group_size: devices that exchange with each other.
      group_hosts: hosts that they are on.
      trips: how often each loop around it goes round, the outermost first.
      source: where it comes from, as JAX names it.
    """

    kind: str
    whole_bytes: int
    axes: tuple[str, ...]
    group_size: int
    group_hosts: int
    trips: tuple[int, ...]
    source: str

    @property
    def sent_bytes(self) -> float:
        """What one device sends each time."""
        if self.kind == "collective-permute":
            return self.whole_bytes
        share = (self.group_size - 1) / self.group_size
        return self.whole_bytes * share * (2 if self.kind == "all-reduce" else 1)

    @property
    def crossing_bytes(self) -> float:
        """What one device sends to other hosts each time."""
        if self.group_hosts == 1:
            return 0.0
        here = self.group_size / self.group_hosts
        if self.kind == "all-to-all":
            return self.whole_bytes * (self.group_size - here) / self.group_size
        return self.sent_bytes / here


class Traffic(NamedTuple):
    """What one device sends.

    Attributes:
      count: of operations.
      sent_bytes: all that it sends.
      crossing_bytes: of these, what goes to other hosts.
    """

    count: int
    sent_bytes: float
    crossing_bytes: float


def find_collectives(hlo: str, sizes: Mapping[str, int], *, hosts: int = 1) -> list[Collective]:
    """Find the collective operations of a program.

    Args:
      hlo: the optimized program.
      sizes: of the axes of the mesh; devices that are next to each other differ in the last one.
      hosts: that the devices are spread over, in their order, evenly.

    Returns:
      list in the order of the program; an operation of a computation that is called in two places
      is there twice.

    Raises:
      ValueError: if the text is no program.
    """
    computations, entry = _split(hlo)
    devices = _Devices(sizes, hosts)

    def walk(name: str, trips: tuple[int, ...]) -> Iterator[Collective]:
        types: dict[str, str] = {}
        for line in computations.get(name, ()):
            if (match := _LINE.match(line)) is None:
                continue
            result, kind, opcode, operands, rest = match.groups()
            types[result] = kind
            if opcode in _CALLERS:
                inner = trips
                if opcode == "while":
                    known = _TRIPS.search(rest)
                    inner = (*trips, int(known[1]) if known else 1)
                for called in _list_called(rest):
                    yield from walk(called, inner)
            elif opcode.removesuffix("-start") in KINDS:
                names = re.findall(r"%([\w.\-]+)", operands)
                size = sum(_count_bytes(types[each]) for each in names)
                yield devices.describe(opcode.removesuffix("-start"), size, trips, rest)

    return list(walk(entry, ()))


def sum_traffic(collectives: Sequence[Collective], *, loops: int = 0) -> Traffic:
    """Add up what one device sends.

    Args:
      collectives: from `find_collectives`.
      loops: how many of the outermost loops around an operation do not count.
    """
    times = [math.prod(each.trips[loops:]) for each in collectives]
    pairs = list(zip(times, collectives, strict=True))
    return Traffic(
        sum(times),
        sum(n * each.sent_bytes for n, each in pairs),
        sum(n * each.crossing_bytes for n, each in pairs),
    )


def group_collectives(
    collectives: Sequence[Collective],
) -> dict[tuple[str, tuple[str, ...]], list[Collective]]:
    """Sort operations by kind and axes.

    Args:
      collectives: from `find_collectives`.

    Returns:
      dict (kind, axes) -> operations, the most bytes first.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, each.axes), []).append(each)
    return dict(sorted(groups.items(), key=lambda item: -sum_traffic(item[1]).sent_bytes))


def _split(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by its name, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            lines = computations[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("an optimized program has an entry, this text has none")
    return computations, entry


def _list_called(attributes: str) -> list[str]:
    names = _CALLED.findall(attributes)
    for branches in _BRANCHES.findall(attributes):
        names += re.findall(r"%?([\w.\-]+)", branches)
    return names


def _count_bytes(type_text: str) -> int:
    total = 0
    for name, shape in re.findall(r"([a-z]\w*)\[([\d,]*)\]", type_text):
        bits = 8 if name == "pred" else int((re.search(r"\d+", name) or ["0"])[0])
        total += math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
    return total


class _Devices:
    """The devices that a program is for, by their numbers in the order of the mesh."""

    def __init__(self, sizes: Mapping[str, int], hosts: int):
        self.names, shape = tuple(sizes), tuple(sizes.values())
        self.count = math.prod(shape)
        self.hosts = np.arange(self.count) * hosts // self.count
        self.coordinates = np.stack(np.unravel_index(np.arange(self.count), shape), -1)

    def describe(self, kind: str, size: int, trips: tuple[int, ...], attributes: str) -> Collective:
        groups = self._list_groups(attributes)
        varies = np.zeros(len(self.names), bool)
        for group in groups:
            here = self.coordinates[group]
            varies |= (here != here[:1]).any(axis=0)
        source = re.search(r'op_name="([^"]*)"', attributes)
        return Collective(
            kind=kind,
            whole_bytes=size * (len(groups[0]) if kind == "all-gather" else 1),
            axes=tuple(name for name, is_axis in zip(self.names, varies, strict=True) if is_axis),
            group_size=len(groups[0]),
            group_hosts=max(len(set(self.hosts[group])) for group in groups),
            trips=trips,
            source=source[1] if source else "",
        )

    def _list_groups(self, attributes: str) -> list[list[int]]:
        """Read groups in any of the forms that XLA writes."""
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
            sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
            names = re.findall(r"'(\w+)'=", mesh[1])
            inside = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[2])]
            outside = [axis for axis in range(len(names)) if axis not in inside]
            numbers = np.arange(self.count).reshape(sizes).transpose(*outside, *inside)
            return numbers.reshape(-1, math.prod(sizes[axis] for axis in inside)).tolist()
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
        if iota:
            shape, dims, order = (
                [int(n) for n in (t or "").split(",") if n] for t in iota.groups()
            )
            numbers = np.arange(self.count).reshape(dims)
            return numbers.transpose(order or range(len(dims))).reshape(shape).tolist()
        listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
        if listed:
            return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return [list(range(self.count))]
