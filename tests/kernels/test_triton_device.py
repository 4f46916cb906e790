"""On which devices Triton kernels run, and what is said where they cannot."""

import importlib.machinery

import jax
import pytest

from pallas_kernels import aot
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.machine import Gpu
from pallas_kernels.triton import device


@pytest.fixture
def installed(monkeypatch):
    """Name -> version of the packages that are installed; the tried pair, until it is changed."""
    versions = dict(device.VERSIONS)

    def find_spec(name):
        return importlib.machinery.ModuleSpec(name, None) if name in versions else None

    monkeypatch.setattr(device.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(device.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(device, "find_gpu", lambda: None)
    device._ask_driver.cache_clear()
    yield versions
    device._ask_driver.cache_clear()


def _check(kind="NVIDIA A100-SXM4-80GB"):
    with jax.sharding.use_abstract_mesh(make_abstract_gpu(kind, 108)):
        return device.check_device()


def _refusal(**options):
    with pytest.raises(NotImplementedError) as refusal:
        _check(**options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_every_target_is_known_by_its_capability(installed):
    for gpu in aot.TARGETS.values():
        assert _check(gpu.name) == gpu.compute_capability


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without a GPU")
def test_a_cpu_is_refused():
    with pytest.raises(NotImplementedError, match="^implementation='triton' needs an NVIDIA GPU, "):
        device.check_device()


@pytest.mark.parametrize("name", device.VERSIONS)
def test_a_missing_package_names_the_extra(name, installed):
    del installed[name]
    message = f"needs {name}, which is not installed: pip install 'sparsejax[triton]'"
    assert _refusal() == f"implementation='triton' {message}"


def test_triton_of_another_version_is_refused(installed):
    installed["triton"] = "3.6.0"
    assert "was tried with triton 3.9.0, found 3.6.0: pip install" in _refusal()


def test_a_vendors_build_of_the_version_is_taken(installed):
    installed["triton"] = "3.9.0+git1234"
    assert _check() == (8, 0)


class _Device:
    platform, device_kind = "gpu", "NVIDIA GB10"

    def __init__(self, capability, shared):
        self.compute_capability, self.shared_memory_per_block_optin = capability, shared


@pytest.mark.parametrize(
    ("capability", "shared", "needed"),
    # Of the newest row that is not above: 12.0, 8.9 and 9.0.
    [("12.1", 101_376, None), ("12.1", 65_536, 101_376), ("8.9", 101_375, 101_376),
     ("9.0", 101_376, 232_448)],
)  # fmt: skip
def test_too_little_shared_memory_is_refused(capability, shared, needed, installed, monkeypatch):
    monkeypatch.setattr(device, "targets_gpu", lambda: True)
    monkeypatch.setattr(device.jax, "devices", lambda platform: [_Device(capability, shared)])
    if needed is None:
        assert device.check_device() == tuple(map(int, capability.split(".")))
        return
    message = f"needs {needed} bytes of shared memory for a block on compute capability"
    with pytest.raises(NotImplementedError, match=f"{message} {capability}, found {shared}; "):
        device.check_device()


def test_a_device_that_no_table_has_is_asked_of_the_driver(installed, monkeypatch):
    for kind, capability in (("NVIDIA A40", "8.6"), ("Tesla T4", "7.5")):
        gpu = Gpu(kind, "580.65.06", capability, 1)
        monkeypatch.setattr(device, "find_gpu", lambda gpu=gpu: gpu)
        if capability == "8.6":
            assert _check(kind) == (8, 6)
        else:
            assert "needs compute capability 8.0 or newer, found 7.5" in _refusal(kind=kind)
    assert "whose compute capability is known, found 'NVIDIA B7'" in _refusal(kind="NVIDIA B7")
