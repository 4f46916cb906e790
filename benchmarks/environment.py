"""What a measurement depends on besides its own settings: machine, versions, revision, date."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess

import jax

from pallas_kernels.triton.device import check_device

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@functools.cache
def device_name() -> str:
    """Name the device JAX computes on, precisely enough to be part of a result's key.

    Returns:
      str, such as `"NVIDIA H200"`, or CPU model and usable cores: `"<model>, 2 cores"`.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"


@functools.cache
def _fixed_facts() -> dict[str, str]:
    facts = {
        "device": device_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability:
        facts["compute_capability"] = capability
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        facts["driver"] = driver.splitlines()[0]
    revision = _output_of("git", "rev-parse", "--short=12", "HEAD")
    if revision:
        changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
        facts["revision"] = revision + ("+changes" if changed else "")
    return facts


def describe_environment() -> dict[str, str]:
    """Describe where and on what a measurement is taken.

    Returns:
      dict with `device`, `python`, `jax`, `jaxlib`, `flax`, `numpy`, `date` (UTC, to the minute),
      and, where they exist, `compute_capability` and `driver` (NVIDIA) and `revision` (git,
      `+changes` if files differ).
    """
    now = datetime.datetime.now(datetime.UTC)
    return {**_fixed_facts(), "date": now.strftime("%Y-%m-%d %H:%M")}


def find_triton_refusal() -> str | None:
    """Say why Triton kernels cannot run on this machine's GPU, None if they can."""
    try:
        check_device()
    except NotImplementedError as reason:
        return str(reason)
    return None
