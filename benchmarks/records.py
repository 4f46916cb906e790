"""Results on disk: one JSON file per question, written point by point, and tables made from it."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

type Key = Mapping[str, str | int | float | bool]
"""What was measured; two points with equal keys are the same measurement."""


class Column(NamedTuple):
    """One column of a Markdown table.

    Attributes:
      title: str, the column's head.
      cell: function from a record `{"key": ..., "values": ..., "environment": ...}` to the text
        of the cell. A missing value (KeyError, or None returned) becomes a dash.
      optional: whether a device's table leaves the column out if it holds dashes only.
    """

    title: str
    cell: Callable[[Mapping[str, Any]], str | None]
    optional: bool = False


class Results:
    """Records of one results file, kept in the order they were first taken.

    Every `record` rewrites the file through a rename, so that a run that is cut off leaves a
    whole file with the points it had finished.
    """

    def __init__(self, path: pathlib.Path):
        """Read the file if it exists.

        Args:
          path: the JSON file, such as `benchmarks/results/attention.json`.

        Raises:
          ValueError: if the file is there but is not a results file.
        """
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                records = json.loads(path.read_text())["points"]
                self._records = {_canonical(record["key"]): record for record in records}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is not a results file: expected a JSON object with a list `points`"
                ) from error

    def __contains__(self, key: Key) -> bool:
        return _canonical(key) in self._records

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._records[_canonical(key)]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return list(self._records.values())

    def record(self, key: Key, values: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Keep one point, replacing an earlier one with the same key, and write the file.

        Args:
          key: what was measured.
          values: what came out; JSON values only.
          environment: where, from `describe_environment()`.
        """
        self._records[_canonical(key)] = {
            "key": dict(key),
            "values": dict(values),
            "environment": dict(environment),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps({"points": self.records}, indent=1) + "\n")
        os.replace(unfinished, self.path)


def _canonical(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


def make_table(records: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Make a Markdown table, one row per record, under a line that says where it was measured.

    Args:
      records: as `Results.records` returns them; grouped by device, in order of appearance.
      columns: the columns, left to right.

    Returns:
      str, one table per device, each after a line with device, driver, versions and dates.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["environment"]["device"], []).append(record)
    return "\n".join(_caption(group) + "\n\n" + _rows(group, columns) for group in groups.values())


def _caption(records: Sequence[Mapping[str, Any]]) -> str:
    def join(name: str) -> str:
        return ", ".join(dict.fromkeys(r["environment"].get(name, "") for r in records)).strip(", ")

    driver = f", driver {join('driver')}" if join("driver") else ""
    dates = sorted(record["environment"]["date"][:10] for record in records)
    taken = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"**{join('device')}**{driver}, jax {join('jax')}, Python {join('python')}, {taken}"


def _rows(records: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    def cell(column: Column, record: Mapping[str, Any]) -> str:
        try:
            return column.cell(record) or "–"
        except KeyError:
            return "–"

    cells = {column: [cell(column, record) for record in records] for column in columns}
    shown = [c for c in columns if not c.optional or any(text != "–" for text in cells[c])]
    lines = [[column.title for column in shown], ["---"] * len(shown)]
    lines += [[cells[column][row] for column in shown] for row in range(len(records))]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
