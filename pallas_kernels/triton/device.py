"""Whether Triton kernels can run where traced code will, and on which compute capability."""

import functools
import importlib.metadata
import importlib.util
import pathlib
import tomllib
from typing import Any

import jax

from pallas_kernels.dispatch import target_platform, targets_gpu
from pallas_kernels.machine import find_gpu
from pallas_kernels.triton.interpretation import find_interpretation
from pallas_kernels.triton.tile_tables import find_row

# The pair that was tried; `pyproject.toml` pins the same.
VERSIONS = {"jax_triton": "0.4.1", "triton": "3.9.0"}
OLDEST = (8, 0)
_INSTALL = "pip install 'sparsejax[triton]'"


def check_device() -> tuple[int, int]:
    """Raise unless Triton kernels can run where traced code will.

    That is an NVIDIA GPU of compute capability 8.0 or newer, the one of the abstract mesh in force
    before the default one; or a CPU on which they are interpreted.

    Returns:
      (major, minor), the compute capability to compile for.

    Raises:
      NotImplementedError: with the reason.
    """
    interpretation = find_interpretation()
    if interpretation is not None:
        return interpretation.capability
    capability = find_capability()
    check_packages()
    if capability < OLDEST:
        major, minor = capability
        raise NotImplementedError(
            "implementation='triton' needs compute capability 8.0 or newer, found "
            f"{major}.{minor}; 'xla' runs on every device"
        )
    _check_shared_memory(capability)
    return capability


def find_capability() -> tuple[int, int]:
    """Return the compute capability that traced code will be compiled for.

    Returns:
      (major, minor).

    Raises:
      NotImplementedError: if the device is no NVIDIA GPU, or is only compiled for and its
        compute capability is not known.
    """
    if not targets_gpu():
        raise NotImplementedError(
            f"implementation='triton' needs an NVIDIA GPU, found {target_platform()!r}; 'xla' runs "
            "on every device"
        )
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    if abstract_device is None:
        device = jax.devices("gpu")[0]
        kind, text = device.device_kind, str(getattr(device, "compute_capability", ""))
    else:
        kind = abstract_device.device_kind
        text = _read_capabilities().get(kind) or _ask_driver(kind)
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise NotImplementedError(
            "implementation='triton' needs an NVIDIA GPU whose compute capability is known, found "
            f"{kind!r}"
        )
    return int(major), int(minor)


def _check_shared_memory(capability: tuple[int, int]) -> None:
    """Raise if a block gets less than on the devices that the tiles were made for."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return
    found = getattr(jax.devices("gpu")[0], "shared_memory_per_block_optin", None)
    least = {
        tuple(gpu["compute_capability"]): gpu["shared_memory_per_block_bytes"]
        for gpu in _read_targets()
    }
    needed = find_row(least, capability)
    if found is not None and found < needed:
        raise NotImplementedError(
            f"implementation='triton' needs {needed} bytes of shared memory for a block on compute "
            f"capability {capability[0]}.{capability[1]}, found {found}; 'xla' runs on every device"
        )


@functools.cache
def _read_targets() -> tuple[dict[str, Any], ...]:
    """Figures of the GPUs that programs can be compiled for."""
    path = pathlib.Path(__file__).parents[1] / "gpu_targets.toml"
    return tuple(tomllib.loads(path.read_text()).values())


@functools.cache
def _read_capabilities() -> dict[str, str]:
    """Name of a GPU -> compute capability, of those that programs can be compiled for."""
    return {gpu["name"]: ".".join(map(str, gpu["compute_capability"])) for gpu in _read_targets()}


@functools.cache
def _ask_driver(kind: str) -> str:
    gpu = find_gpu()
    return gpu.capability if gpu is not None and gpu.kind == kind else ""


def check_packages() -> None:
    """Raise unless Triton and jax-triton are installed, in the versions that were tried.

    Raises:
      NotImplementedError: with the package, and how to install it.
    """
    for name, wanted in VERSIONS.items():
        found = _find_version(name)
        if found is None:
            raise NotImplementedError(
                f"implementation='triton' needs {name}, which is not installed: {_INSTALL}"
            )
        if found != wanted:
            raise NotImplementedError(
                f"implementation='triton' was tried with {name} {wanted}, found {found}: {_INSTALL}"
            )


def _find_version(name: str) -> str | None:
    """Return the version of a package without importing it, None if it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        # A vendor's build of a version says so behind a plus.
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "an unknown version"
