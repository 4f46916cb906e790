"""The lock files install what pyproject.toml asks for, from whichever index pip is given."""

import itertools
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pallas_kernels.triton.device import VERSIONS
from tests.architecture.project_files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RUN = [*PROJECT["dependencies"], *EXTRAS["data"], *EXTRAS["pretrained"]]
LOCKS = {
    "train": RUN,
    "docs": [*RUN, *EXTRAS["docs"]],
    "dev": [*RUN, *EXTRAS["docs"], *EXTRAS["dev"]],
    "cuda": [*RUN, *EXTRAS["docs"], *EXTRAS["dev"], *EXTRAS["cuda"]],
    "compile": EXTRAS["compile"],
}
PIN = re.compile(r"([A-Za-z0-9_.-]+)==([\w.!+]+)(?: ; .+)?")


def read_pins(text):
    """Return {name: version} of a lock whose every line is `name==version`, maybe with a marker."""
    pins = {}
    for line in text.splitlines():
        match = PIN.fullmatch(line)
        if match is None or "://" in line:
            raise ValueError(f"expected name==version, got {line!r}")
        pins[canonicalize_name(match.group(1))] = match.group(2)
    return pins


def find_unmet(requirements, pins):
    """Return the requirements that the pins do not meet."""
    unmet = []
    for requirement in map(Requirement, requirements):
        version = pins.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            unmet.append(f"{requirement} but the lock has {version}")
    return unmet


@pytest.mark.parametrize("name", LOCKS)
def test_lock_is_pinned_and_covers_the_project(name):
    pins = read_pins((ROOT / "requirements" / f"{name}.txt").read_text())
    assert find_unmet(LOCKS[name], pins) == []


def test_locks_agree_and_the_compiler_fits_jax():
    pins = {name: read_pins((ROOT / "requirements" / f"{name}.txt").read_text()) for name in LOCKS}
    for lock, larger in itertools.pairwise(("train", "docs", "dev", "cuda")):
        assert pins[lock].items() <= pins[larger].items()
    assert pins["compile"]["jax-cuda13-plugin"] == pins["train"]["jaxlib"]
    # Where CUDA's lock is installed, `make plan` compiles with what it brought.
    assert pins["compile"].items() <= pins["cuda"].items()


def test_triton_is_the_tried_pair_wherever_it_is_installed():
    pins = {package.replace("_", "-"): version for package, version in VERSIONS.items()}
    asked = {(r.name, str(r.specifier)) for r in map(Requirement, EXTRAS["triton"])}
    assert asked == {(name, f"=={version}") for name, version in pins.items()}
    for extra in ("cuda", "dev"):
        assert set(EXTRAS["triton"]) <= set(EXTRAS[extra])
        lock = read_pins((ROOT / "requirements" / f"{extra}.txt").read_text())
        assert pins.items() <= lock.items()


def test_faults_of_a_lock_are_found():
    assert find_unmet(["jax>=0.11.2,<0.13", "ml_collections"], {"jax": "0.13.0"}) == [
        "jax<0.13,>=0.11.2 but the lock has 0.13.0",
        "ml_collections but the lock has None",
    ]
    for line in ("jax>=0.11", "--extra-option", "jax @ https://example.org/jax.whl"):
        with pytest.raises(ValueError, match="expected name==version"):
            read_pins(line)
