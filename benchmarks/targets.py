"""Targets of a benchmark: numbers to reach, evaluated on what was recorded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

type Record = Mapping[str, Any]
"""A point of a results file: `{"key": ..., "values": ..., "environment": ...}`."""


class Target(NamedTuple):
    """A number to reach in every point it speaks of.

    Attributes:
      name: str, what is claimed.
      value: function of a record to the number, None where the target does not speak of it or a
        function was not measured.
      holds: function of the number: whether the target is met there.
      worst: `min` or `max`, which of the numbers is farthest from holding.
    """

    name: str
    value: Callable[[Record], float | None]
    holds: Callable[[float], bool]
    worst: Callable[[Sequence[float]], float] = min


def seconds_of(record: Record, name: str) -> float:
    """Return the median time of a function.

    Args:
      record: of one point.
      name: str, the function.

    Returns:
      float, seconds.
    """
    return record["values"][name]["median_seconds"]


def times_faster(record: Record, name: str, peer: str) -> float | None:
    """Return how many times faster a function is than another of the same point.

    Args:
      record: of one point.
      name: str, the function.
      peer: str, the other.

    Returns:
      float, time of the peer over time of the function, or None if one was not measured.
    """
    seconds = [record["values"].get(n, {}).get("median_seconds") for n in (name, peer)]
    return None if None in seconds else seconds[1] / seconds[0]


def evaluate(targets: Sequence[Target], records: Sequence[Record]) -> str:
    """Say of each target whether the records meet it.

    A target is met on a device if every one of its points there meets it.

    Args:
      targets: of the benchmark.
      records: of all devices.

    Returns:
      str, a line per target, and per device where the target was measured.
    """
    lines = []
    for target in targets:
        by_device: dict[str, list[float]] = {}
        for record in records:
            value = target.value(record)
            if value is not None:
                by_device.setdefault(record["key"]["device"], []).append(value)
        for device, values in by_device.items():
            worst = target.worst(values)
            outcome = "met" if target.holds(worst) else "missed"
            lines.append(
                f"{outcome}: {target.name} (worst of {len(values)}: {worst:.3g}, {device})"
            )
        if not by_device:
            lines.append(f"not measured: {target.name}")
    return "\n".join(lines)
