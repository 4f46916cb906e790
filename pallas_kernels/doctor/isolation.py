"""Run a program in a process of its own, which may hang or die without harm to the caller."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_ILLEGAL = ("ILLEGAL_ADDRESS", "illegal memory access", "misaligned address")
# A process that the driver holds cannot be killed; the caller goes on without it.
_SECONDS_TO_DIE = 10.0
_POLL_SECONDS = 0.25


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      fault: "" if it returned 0; "hang", if it was stopped or stopped itself by an alarm; "illegal
        address"; or "crash" with the exit code or signal and the last line it wrote.
      output: what it wrote to both of its streams, the last 20,000 characters.
    """

    fault: str
    output: str


def run_isolated(
    command: Sequence[str],
    *,
    limit_seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
    show: bool = False,
    stop: threading.Event | None = None,
) -> Ended:
    """Run a command, and kill it and its children when its time is up.

    On a GPU it does not take memory in advance, so that others have some.

    Args:
      command: program and arguments.
      limit_seconds: float, after which it is a hang.
      environment: variables set besides those of this process.
      folder: where it runs; None: here.
      show: whether its output goes to the streams of this process; `Ended.output` is empty then.
      stop: when it is set, the process is killed as if its time were up.
    """
    variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})}
    with tempfile.TemporaryFile() as written:
        # A file and not a pipe: a grandchild that lives on would keep a pipe open.
        streams = {} if show else {"stdout": written, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, env=variables, cwd=folder, start_new_session=True, **streams
        )
        try:
            code = _wait(process, limit_seconds, stop)
        finally:
            _kill_group(process)
        written.seek(max(0, written.seek(0, os.SEEK_END) - 20_000))
        output = written.read().decode(errors="replace")
    if code == 0:
        return Ended("", output)
    if code in (None, -signal.SIGALRM):
        return Ended("hang", output)
    if any(text in output for text in _ILLEGAL):
        return Ended("illegal address", output)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Ended(f"crash, {how}" + (f": {lines[-1][:200]}" if lines else ""), output)


def _wait(
    process: subprocess.Popen, limit_seconds: float, stop: threading.Event | None
) -> int | None:
    """Return the exit code, or None if the time is up or the process was to stop."""
    deadline = time.monotonic() + limit_seconds
    while (left := deadline - time.monotonic()) > 0 and not (stop and stop.is_set()):
        try:
            return process.wait(min(left, _POLL_SECONDS if stop else left))
        except subprocess.TimeoutExpired:
            continue
    return None


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_DIE)
