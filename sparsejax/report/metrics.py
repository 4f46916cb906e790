"""Record metrics as JSON lines and TensorBoard events, fetched from the device one step late."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

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


def _iterate_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            row = load_json(line)
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}, must be a JSON object with a step, got {line[:80]!r}"
            ) from error
        yield line, row


def _rewind(path: Path, resume_step: int | None) -> None:
    """Drop the lines after `resume_step`, so that the steps run again write them anew."""
    kept = b""
    if resume_step is not None and path.exists():
        kept = b"".join(line for line, row in _iterate_lines(path) if row["step"] <= resume_step)
    replacement = path.with_name(path.name + ".new")
    replacement.write_bytes(kept)
    replacement.replace(path)


class MetricsWriter:
    """Append metrics to `metrics.jsonl` and to TensorBoard events under `tensorboard/`.

    Each line is flushed as it is written. On resume the lines after the checkpoint's step
    are dropped in one atomic replacement (and hidden in TensorBoard), so the file reads like
    that of an uninterrupted run; for this, whatever is still deferred must be written
    before a checkpoint is saved.

    Args:
      workdir: folder of the run; it must exist.
      resume_step: int, step of the checkpoint that training goes on from, or None to begin
        an empty file.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None):
        self._path = Path(workdir) / "metrics.jsonl"
        _rewind(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        first_step = 0 if resume_step is None else resume_step + 1
        self._events = SummaryWriter(
            str(Path(workdir) / "tensorboard"), purge_step=first_step, flush_secs=10
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; its numbers also become TensorBoard scalars.

        Args:
          step: int, optimiser steps done.
          values: JSON values by name, such as {"phase": "sparse", "loss": 2.5}.

        Raises:
          ValueError: if a value is not JSON (an array, say) or `values` has its own "step".
        """
        if "step" in values:
            raise ValueError(f"values must not contain 'step', got {values['step']!r}")
        line = dump_json({"step": step, **values}, "metrics")
        self._file.write(line + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard events and close both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


type Fetched = tuple[int, dict[str, Any]]


class DeferredMetrics:
    """Fetch small arrays one step late, so that the host never waits for the running step."""

    def __init__(self):
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> Fetched | None:
        """Start copying this step's metrics to the host and return those of the step before.

        Args:
          step: int, optimiser steps done.
          metrics: scalars by name, or vectors with an entry for each layer.

        Returns:
          (step, values) of the previous call, as Python numbers and lists of them, or None if
          there was none.

        Raises:
          ValueError: if an array has more than one axis.
        """
        for name, array in metrics.items():
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


def _fetch(pending: tuple[int, Mapping[str, jax.Array]] | None) -> Fetched | None:
    if pending is None:
        return None
    step, metrics = pending
    return step, {name: array.tolist() for name, array in metrics.items()}
