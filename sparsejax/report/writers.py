"""Who else is told of every row of metrics, and what happens if that fails."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class RowWriter(Protocol):
    """Something beside `metrics.jsonl` that wants the rows of a run: a tracking service, say."""

    def write(self, step: int, row: Mapping[str, Any], /) -> None:
        """Take one row.

        Args:
          step: int, steps done. A resumed run tells the steps after its checkpoint again.
          row: JSON values by name; `docs/metrics.md` lists them.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections: the run ends, or this writer has failed."""
        ...


class SilentWriter:
    """What a process has that does not write: of several the first one does."""

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class OptionalWriter:
    """A writer that training does without once it has failed.

    Any exception counts: a run of days must not end because a service does not answer.

    Args:
      writer: told of rows until it fails.
      warn: told of the failure.
    """

    def __init__(self, writer: RowWriter, warn: Callable[[str], None]):
        self._writer: RowWriter | None = writer
        self._warn = warn

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Pass a row on."""
        if self._writer is not None:
            try:
                self._writer.write(step, row)
            except Exception as error:
                self._tell("failed, training goes on without it", error)
                with contextlib.suppress(Exception):
                    self._writer.close()
                self._writer = None

    def close(self) -> None:
        """Close the writer, unless it has failed or is closed."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._tell("could not be closed", error)
            self._writer = None

    def _tell(self, what: str, error: Exception) -> None:
        reason = " ".join(str(error).split())
        name = type(self._writer).__name__
        self._warn(f"warning: {name} {what}: {type(error).__name__}: {reason}")
