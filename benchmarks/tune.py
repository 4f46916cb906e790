"""Which tiles make the Triton kernels fastest on this GPU? Candidates timed one beside another.

    python -m benchmarks.tune [--op=NAME] [--force] [--budget-seconds=N]

Each point is one kernel of an op and one key of its table of tiles. What comes out, printed and
below the table, are rows for the tables (`<op>/triton/tiles.py`) of the compute capability that was
found. No kernel is tuned when a model calls it: the tables are all that a call reads.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.environment import device_name
from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.records import Column, Results
from benchmarks.targets import Record
from benchmarks.tune_kernels import TUNED_OPS, Kernel, list_kernels
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.tile_tables import Cut


def name_tile(cut: Any) -> str:
    """Write a tile as it stands in a table, such as "Tile(64, 64, 4, 3)"."""
    return f"{type(cut).__name__}{tuple(cut)}"


def make_case(kernel: Kernel) -> Case:
    """Make the functions that one point compares: the tile of the table, and every candidate."""

    def use(cut: Cut) -> Callable[..., Any]:
        return functools.partial(kernel.run, cut)

    functions = {name_tile(cut): use(cut) for cut in (kernel.default, *kernel.candidates)}
    return Case(
        functions=functions,
        args=kernel.make(),
        reference=use(kernel.default),
        tolerance=2e-2,
    )


def find_fastest(record: Record) -> str | None:
    """Return the tile that took the least time; None if none was timed.

    Args:
      record: of one point.
    """
    seconds = {
        name: value["median_seconds"]
        for name, value in record["values"].items()
        if "median_seconds" in value
    }
    return min(seconds, key=lambda name: seconds[name], default=None)


def describe_rows(records: Sequence[Record], device: str) -> str:
    """Write what a device's rows of the tables should be.

    Args:
      records: of all devices.
      device: name of the one that was measured.

    Returns:
      str in Markdown, empty if nothing was measured there.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        key, fastest = record["key"], find_fastest(record)
        if key["device"] == device and fastest is not None:
            entry = key["op"], key["capability"], key["key"]
            found.setdefault(entry, []).append(f"{key['tile']}={fastest}".lstrip("="))
    if not found:
        return ""
    lines = (
        f"# {op}, {capability}\n{key}: {', '.join(tiles)}\n"
        for (op, capability, key), tiles in found.items()
    )
    return f"\nRows for `<op>/triton/tiles.py`, on {device}:\n\n```python\n{''.join(lines)}```\n"


def _milliseconds(choose: Callable[[Record], str | None]) -> Callable[[Any], str | None]:
    def cell(record):
        name = choose(record)
        seconds = record["values"].get(name, {}).get("median_seconds")
        return None if seconds is None else f"{1e3 * seconds:.3g}"

    return cell


COLUMNS = (
    Column("op", lambda r: f"`{r['key']['op']}`"),
    Column("compute capability", lambda r: r["key"]["capability"]),
    Column("key", lambda r: r["key"]["key"]),
    Column("tile", lambda r: r["key"]["tile"]),
    Column("of the table", lambda r: r["key"]["default"]),
    Column("ms", _milliseconds(lambda r: r["key"]["default"])),
    Column("fastest", find_fastest),
    Column("ms", _milliseconds(find_fastest)),
    Column("candidates", lambda r: str(len(r["values"]))),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print the table and the rows.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every candidate agreed with its reference, 2 where Triton cannot run.
    """
    description = (__doc__ or "").splitlines()[0]
    parsed = vars(parse_arguments(description, arguments, choices={"op": TUNED_OPS}))
    del parsed["headline"]
    op = parsed.pop("op")
    try:
        capability = check_device()
    except NotImplementedError as reason:
        print(f"tiles are timed on a GPU: {reason}", file=sys.stderr)
        return 2
    points = [
        Point(
            key={
                "op": kernel.op,
                "capability": ".".join(map(str, capability)),
                "key": kernel.key,
                "tile": kernel.tile,
                "default": name_tile(kernel.default),
            },
            make_case=functools.partial(make_case, kernel),
        )
        for kernel in list_kernels(capability)
        if op in (None, kernel.op)
    ]
    failures = run_points("tune", points, COLUMNS, **parsed)
    rows = describe_rows(Results(RESULTS / "tune.json").records, device_name())
    with (RESULTS / "tune.md").open("a") as table:
        table.write(rows)
    print(rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
