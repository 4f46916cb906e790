"""Start the processes of a run on this machine, each with two devices that the CPU plays."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = """
import json, pathlib
import ml_collections

def get_config():
    text = pathlib.Path(__file__).with_suffix(".json").read_text()
    return ml_collections.ConfigDict(json.loads(text))
"""
LIMIT_SECONDS = 300
# What the library that joins CPUs says. Its threads speak at once, so that pieces may mix.
_GLOO = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to "
    r"| peer ranks\. Expected number of connected peer ranks is : )*"
)


def write_config(folder: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    """Write settings as a config file."""
    (folder / "config.json").write_text(json.dumps(settings))
    path = folder / "config.py"
    path.write_text(_CONFIG)
    return path


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


class Launched:
    """Processes of one run, and what they have said.

    Args:
      folder: where their output is kept.
      arguments: of `train.py`, for all of them.
      own: further arguments of each; as many as there are processes.
      program: what runs in place of `train.py`.
      devices: of each process.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        arguments: Sequence[str],
        own: Sequence[Sequence[str]] = ((), ()),
        program: Sequence[str] = ("train.py",),
        devices: int = 2,
    ):
        flags = (
            f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        )
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        self.began, self._folder, self.processes = time.monotonic(), folder, []
        port = find_port()
        for index, more in enumerate(own):
            places = [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={len(own)}",
                f"--process_id={index}",
            ]
            command = [*program, *arguments, *more, *(places if len(own) > 1 else ())]
            with (
                (folder / f"out{index}").open("w") as out,
                (folder / f"err{index}").open("w") as err,
            ):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=environment,
                        stdout=out,
                        stderr=err,
                    )
                )

    def read_own(self, index: int) -> list[str]:
        """Return the lines of a process so far that are its own."""
        said = (self._folder / f"out{index}").read_text()
        return [line for line in said.splitlines() if not _GLOO.fullmatch(line)]

    def read_errors(self, index: int) -> list[str]:
        """Return the messages of errors of a process so far."""
        lines = (self._folder / f"err{index}").read_text().splitlines()
        return [line for line in lines if line.startswith("error: ")]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to happen while all of them run."""
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.explain()
            assert time.monotonic() < self.began + LIMIT_SECONDS, self.explain()
            time.sleep(0.01)

    def wait(self) -> list[int]:
        """Return the exit codes, in order."""
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            for process in self.processes:
                process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            raise AssertionError(self.explain()) from None
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes]

    def explain(self) -> str:
        """Return all that they have said."""
        names = sorted(path for path in self._folder.iterdir() if path.name[:3] in ("out", "err"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in names)
