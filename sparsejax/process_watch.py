"""How the processes of a run end together: who fails tells the others, who is gone is missed.

A process that fails announces it, and the others end with it. One that is killed tells nobody: the
others see that its heartbeats are missing, or, if it is the first, that the service is gone.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

MEETING_SECONDS = 300
"""So long the first processes wait for the last one."""
LOST = 3
"""Exit code where another process is gone without a word."""
FOREVER_MS = 7 * 24 * 3600 * 1000
"""Time limit of waits that `Watch` ends."""
_FAREWELL_SECONDS = 10
_FAILED, _FAILURES, _SEEN = "sparsejax/failed", "sparsejax/failures/", "sparsejax/seen/"


class Watch:
    """Threads that end this process when another one has failed or is gone.

    Args:
      client: of JAX's coordination service.
      process: this one.
      num_processes: how many there are.

    Attributes:
      is_over: bool, whether the run ends as it should, so that those who leave are not missed.
    """

    current: "Watch | None" = None
    """That of this process, once it has begun."""

    def __init__(self, client: Any, process: int, num_processes: int):
        self.is_over = False
        self._client, self._process, self._num_processes = client, process, num_processes
        self._ending = threading.Lock()

    def start(self) -> None:
        """Begin to watch."""
        Watch.current = self
        for target in (self._listen, self._count_alive):
            threading.Thread(target=target, daemon=True, name="processes").start()

    def fail(self, message: str, code: int) -> NoReturn:
        """Announce an error of this process, and end it.

        Args:
          message: one line.
          code: exit code, of all processes.
        """
        failure = json.dumps({"process": self._process, "message": message, "code": code})
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_FAILURES}{self._process}", message)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            self._client.key_value_set(_FAILED, failure)
        # What all have found wrong is told once.
        time.sleep(0.5)
        told: list[tuple[str, str]] = []
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            told = self._client.key_value_dir_get(_FAILURES)
        before = [text for key, text in told if int(key.rpartition("/")[2]) < self._process]
        self.end("" if message in before else message, code)

    def _listen(self) -> None:
        """Wait for the first failure that is announced."""
        try:
            text = self._client.blocking_key_value_get(_FAILED, FOREVER_MS)
        except jax.errors.JaxRuntimeError:
            return self._lose([0])
        failure = json.loads(text)
        if failure["process"] != self._process:
            # One that fails at the same time tells its own error.
            time.sleep(0.2)
            if not self._has_failed():
                message = f"process {failure['process']} has ended: {failure['message']}"
                self.end(message, failure["code"])

    def _has_failed(self) -> bool:
        try:
            self._client.key_value_try_get(f"{_FAILURES}{self._process}")
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _count_alive(self) -> None:
        processes = list(range(self._num_processes))
        alive: Mapping[int, int] = dict.fromkeys(processes, 0)
        while not self.is_over and len(alive) == len(processes):
            time.sleep(1)
            try:
                # Returns when every process that is alive has asked.
                alive = self._client.get_live_nodes(processes)
            except jax.errors.JaxRuntimeError:
                alive = {x: 0 for x in processes if x}
        self._lose([process for process in processes if process not in alive])

    def _lose(self, processes: list[int]) -> None:
        if self.is_over or self._process in processes:
            return
        names = " and ".join(map(str, processes))
        self.end(
            f"process {names} no longer answers; the same command goes on from the last checkpoint",
            LOST,
        )

    def end(self, message: str, code: int) -> NoReturn:
        """End this process, whatever it does.

        Args:
          message: one line; "" if another process tells it.
          code: exit code.
        """
        # Of several threads the first one ends the process.
        self._ending.acquire()
        if message:
            print(f"error: {message}", file=sys.stderr)
        # With the first process goes the service, so that it has to be the last.
        if code != LOST:
            self._wait_until_seen()
        elif self._process == 0:
            time.sleep(1)
        exit_at_once(code)

    def _wait_until_seen(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_SEEN}{self._process}", "")
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self._process == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(_SEEN)) == self._num_processes:
                    return
                time.sleep(0.1)


def _explain_abort(_signal: int) -> None:
    if Watch.current is None:
        print(
            f"error: all processes must come together within {MEETING_SECONDS} s, but JAX has "
            "given up, as it says above",
            file=sys.stderr,
        )
        exit_at_once(LOST)
    Watch.current.end(
        "JAX has ended this process, as it says above; if another one no longer answers, the same "
        "command goes on from the last checkpoint",
        LOST,
    )


# As long as it is the handler, it must be there.
_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(_explain_abort)


def explain_aborts() -> None:
    """Make an abort end with a message and an exit code.

    JAX aborts when it misses a process, often before a thread of ours has heard of it. A handler of
    Python's would run too late: this one runs in the thread that aborts.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def exit_at_once(code: int) -> NoReturn:
    """Exit without interpreter shutdown, which waits for processes that wait for this one.

    Args:
      code: exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
