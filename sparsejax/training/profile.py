"""Trace a stretch of a run's steps with JAX's profiler."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax

from sparsejax.config.parse import ConfigError


class StepRange(NamedTuple):
    """Steps that are traced.

    Attributes:
      first: the first of them, at least 1.
      last: the last, at least `first`.
    """

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "StepRange":
        """Read "FIRST:LAST".

        Args:
          text: two whole numbers.

        Raises:
          ConfigError: if it is anything else.

        Example:
          >>> StepRange.parse("10:12")
          StepRange(first=10, last=12)
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match and 1 <= int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]))
        raise ConfigError(
            f"--profile_steps must be FIRST:LAST with 1 <= FIRST <= LAST, got {text!r}"
        )

    def check_within(self, first: int, last: int) -> None:
        """Refuse steps of which a run trains none.

        Args:
          first: the first step that it trains.
          last: the last one.

        Raises:
          ConfigError: if no step is both traced and trained.
        """
        if self.last < first or last < self.first:
            raise ConfigError(
                f"--profile_steps must name some of the steps {first} to {last} that are trained, "
                f"got {self.first}:{self.last}"
            )


class StepProfiler:
    """Write a trace of some steps under `profile/`, for TensorBoard and Perfetto.

    To be used as a context manager, whose end ends a trace that is under way.

    Args:
      workdir: folder of the run.
      steps: what to trace; None for nothing.
      warn: told if the trace cannot be written; training goes on without it.
    """

    def __init__(self, workdir: Path, steps: StepRange | None, warn: Callable[[str], None]):
        self._folder, self._steps, self._running = workdir / "profile", steps, False
        self._warn = warn

    def begin_step(self, step: int) -> None:
        """Begin the trace if it begins with a step, or within the stretch where a run resumes.

        Args:
          step: number of the step that comes, from 1.
        """
        if self._steps and not self._running and self._steps.first <= step <= self._steps.last:
            with self._giving_up():
                jax.profiler.start_trace(str(self._folder))
                self._running = True

    def end_step(self, step: int, state: object) -> None:
        """End the trace if a step was its last.

        Args:
          step: number of the step that was dispatched, from 1.
          state: what the step returned, waited for.
        """
        if self._steps and self._running and step >= self._steps.last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        with self._giving_up():
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._steps = None
            reason = " ".join(str(error).split())
            self._warn(f"warning: no trace of steps, training goes on without it: {reason}")

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()
