"""Settings every test shares: the CPU, compiled programs kept between runs, how much is drawn.

JAX reads these when it is imported, so they stand at import time of this file and not in a
fixture. A run that wants a GPU sets `JAX_PLATFORMS` itself.
"""

import importlib.util
import os
import pathlib
import signal
import sys

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A shell that starts the tests in the background lets them ignore it, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Half of the suite's time was LLVM's; the contracts ask for its optimisation themselves.
if os.environ["JAX_PLATFORMS"] == "cpu":
    _flags = ("--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = " ".join(_flags).strip()

# XLA has a thread for each core, and an interpreted warpgroup that waits for another keeps one:
# on two cores all would wait for a warpgroup that never starts.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

_user_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache / "sparsejax" / "xla"))
# The defaults keep only programs that took a second or more; a test suite is made of smaller ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# `make` puts the `compile` extra beside the environment's packages and not among them: without a
# GPU, JAX's CUDA plugin prints a traceback in every program that does not set JAX_PLATFORMS. Where
# requirements/cuda.txt is installed the environment has it, and two copies must not meet.
_compile_extra = pathlib.Path(sys.prefix) / "compile"
if _compile_extra.exists() and importlib.util.find_spec("jax_cuda13_plugin") is None:
    sys.path.append(str(_compile_extra))

hypothesis.settings.register_profile("fast", max_examples=10, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=25, deadline=None)
hypothesis.settings.register_profile("full", max_examples=60, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Draw few examples by default, more in `make test-ci`, most with HYPOTHESIS_PROFILE=full."""
    chosen = config.getoption("markexpr")
    default = "fast" if not chosen or "not ci" in chosen else "ci"
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))
