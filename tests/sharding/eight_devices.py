"""Start a program of its own on eight devices that the CPU plays: JAX counts its devices once."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_ROOT = pathlib.Path(__file__).parents[2]
# Programs are small: to compile them well would take longer than they run.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def run_program(module: str, *names: str) -> dict[str, Any]:
    """Run a module with names as arguments; return the JSON that it prints."""
    result = subprocess.run(
        [sys.executable, "-m", module, *names],
        cwd=_ROOT,
        env=os.environ | {"XLA_FLAGS": _FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)
