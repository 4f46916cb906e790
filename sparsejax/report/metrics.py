"""Record metrics as JSON lines, fetched from the device one step late."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.durable import write_durably
from sparsejax.processes import decide
from sparsejax.recipes import Measured, Metric
from sparsejax.report.writers import OptionalWriter, RowWriter, SilentWriter
from sparsejax.strict_json import dump_json, load_json


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a metrics file, in the order it was written.

    A last line torn by a kill in mid-write is left out.

    Args:
      path: the `metrics.jsonl` of a run.

    Returns:
      One dict per line, each with "step".

    Raises:
      ValueError: if a line before the last is not a JSON object with a step.
    """
    return [row for _, row in _iterate_lines(Path(path))]


def find_missing_steps(rows: Iterable[Mapping[str, Any]], *, num_steps: int) -> list[int]:
    """List the steps that were trained and have no row.

    Args:
      rows: lines of `metrics.jsonl`.
      num_steps: int, steps done.
    """
    told = {row["step"] for row in rows if row.get("kind") == "train"}
    return [step for step in range(1, num_steps + 1) if step not in told]


def format_steps(steps: Iterable[int]) -> str:
    """Write steps as ranges.

    Args:
      steps: int, in ascending order.

    Example:
      >>> format_steps([3, 4, 5, 9])
      '3-5, 9'
    """
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


_NUMBERS = {
    "train": ("loss",),
    "validation": ("validation_loss", "validation_accuracy"),
    "phase": ("step_memory_bytes",),
}
"""What every row of a kind has, beside step and phase."""


def _iterate_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            row = load_json(line)
            _check_row(row)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, must be a JSON object with a step and what its kind has, "
                f"got {line[:80]!r}"
            ) from error
        if row.get("kind") == "phase" and "attention_density" not in row:
            raise ValueError(
                f"{path}, line {number}, must name its 'attention_density', got {line[:80]!r}, as "
                "an earlier version wrote it"
            )
        yield line, row


def _check_row(row: Any) -> None:
    """Refuse a row without what summaries and pictures read of its kind."""
    if type(row["step"]) is not int or row["step"] < 0:
        raise ValueError("step")
    kind = row.get("kind")
    if kind is not None and not isinstance(row["phase"], str):
        raise TypeError("phase")
    for name in _NUMBERS.get(str(kind), ()):
        if not isinstance(row[name], int | float):
            raise TypeError(name)


def _rewind(path: Path, resume_step: int | None) -> list[dict[str, Any]]:
    """Drop the lines after `resume_step`, so that the steps run again write them anew."""
    kept = []
    if resume_step is not None and path.exists():
        kept = [(line, row) for line, row in _iterate_lines(path) if row["step"] <= resume_step]
    write_durably(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


class MetricsWriter:
    """Append metrics to `metrics.jsonl`, and tell other writers of them.

    A line is in the file when `write` returns. On resume the lines after the checkpoint's step are
    dropped in one atomic replacement, so the file reads like that of an uninterrupted run; for
    this, whatever is still deferred must be written before a checkpoint is saved. Lines that it
    lacks are named, and it goes on.

    A run needs its file. It does without another writer from that one's first failure on.

    Args:
      workdir: folder of the run; it must exist.
      resume_step: int, step of the checkpoint that training goes on from, or None to begin
        an empty file.
      writers: told of every row when the file has it, and closed with it.
      warn: told, in one line each, of missing lines and of writers that fail.

    Raises:
      ValueError: if a line of the file is not a row of metrics.
      OSError: if the file cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None,
        writers: Sequence[RowWriter] = (),
        warn: Callable[[str], None] = print,
    ):
        self._path = Path(workdir) / "metrics.jsonl"
        missing = find_missing_steps(_rewind(self._path, resume_step), num_steps=resume_step or 0)
        if missing:
            warn(
                f"warning: {self._path} lacks steps {format_steps(missing)}, and goes on after them"
            )
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._writers = [OptionalWriter(writer, warn) for writer in writers]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, and tell the other writers.

        Args:
          step: int, optimiser steps done.
          values: JSON values by name, such as {"phase": "sparse", "loss": 2.5}.

        Raises:
          ValueError: if a value is not JSON (an array, say) or `values` has its own "step".
          OSError: if the line cannot be written, with the name of the file.
        """
        if "step" in values:
            raise ValueError(f"values must not contain 'step', got {values['step']!r}")
        line = dump_json({"step": step, **values}, "metrics").encode() + b"\n"
        try:
            # A disk that is nearly full takes a part first.
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        """Close the file and the other writers."""
        os.close(self._descriptor)
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@contextlib.contextmanager
def open_metrics(
    workdir: Path,
    *,
    resume_step: int | None,
    writers: Sequence[RowWriter],
    warn: Callable[[str], None],
) -> Iterator[RowWriter]:
    """Open what takes the rows of a run: of several processes on the first, which alone writes.

    Args:
      workdir: as of `MetricsWriter`, and so are the others.

    Raises:
      ValueError: as `MetricsWriter`.
      OSError: likewise.
    """
    with contextlib.ExitStack() as stack:
        opened: list[RowWriter] = [SilentWriter()]

        def open_file() -> None:
            writer = MetricsWriter(workdir, resume_step=resume_step, writers=writers, warn=warn)
            opened.append(stack.enter_context(writer))

        decide(open_file)
        yield opened[-1]


type Fetched = tuple[int, dict[str, Any]]


def fetch_metrics(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Wait for metrics and turn them into JSON values.

    Args:
      metrics: scalars by name, or vectors with an entry for each layer.

    Returns:
      dict of Python numbers and lists of them. A metric that nothing is known of is left out; in a
      list, None stands where it is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> fetch_metrics({
      ...     "loss": jnp.float32(2.5),
      ...     "change": Measured(jnp.array([0.0, 0.5]), jnp.array([False, True])),
      ...     "flips": Measured(jnp.float32(0), jnp.array(False)),
      ... })
      {'loss': 2.5, 'change': [None, 0.5]}
    """
    values = {}
    for name, metric in metrics.items():
        # On the host first: NumPy would ask a device array, which compiles a program to answer.
        value, known = jax.device_get(metric if isinstance(metric, Measured) else (metric, True))
        if not np.any(known):
            continue
        value = value.tolist()
        if isinstance(value, list):
            kept = np.broadcast_to(known, len(value))
            value = [x if keep else None for x, keep in zip(value, kept, strict=True)]
        values[name] = value
    return values


class DeferredMetrics:
    """Fetch small arrays one step late, so that the host never waits for the running step."""

    def __init__(self):
        self._pending: tuple[int, Mapping[str, Metric]] | None = None

    def push(self, step: int, metrics: Mapping[str, Metric]) -> Fetched | None:
        """Start copying this step's metrics to the host and return those of the step before.

        Args:
          step: int, optimiser steps done.
          metrics: scalars by name, or vectors with an entry for each layer.

        Returns:
          (step, values) of the previous call, values as of `fetch_metrics`, or None if there was
          none.

        Raises:
          ValueError: if an array has more than one axis.
        """
        for name, metric in metrics.items():
            for array in metric if isinstance(metric, Measured) else (metric,):
                if len(array.shape) > 1:
                    raise ValueError(
                        f"metrics[{name!r}] must be a scalar or a vector, got shape {array.shape}"
                    )
                array.copy_to_host_async()
        previous, self._pending = self._pending, (step, metrics)
        return _fetch(previous)

    def flush(self) -> Fetched | None:
        """Wait for the metrics still on their way and return them.

        Returns:
          (step, values) of the last `push`, or None if they were already returned.
        """
        previous, self._pending = self._pending, None
        return _fetch(previous)


def _fetch(pending: tuple[int, Mapping[str, Metric]] | None) -> Fetched | None:
    return None if pending is None else (pending[0], fetch_metrics(pending[1]))
