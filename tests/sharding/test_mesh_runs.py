"""Whole runs on eight devices: the losses, weights and masks of one device, by parts."""

import functools

import pytest

from tests.sharding.eight_devices import run_program
from tests.sharding.mesh_runs import RESUMED, SHORT, list_runs
from tests.tiers import tier

# Weights that grow, and masks of both kinds; a run takes a minute, and `make test-all` runs all
# recipes on all meshes.
_CHOSEN = ["rigl/data=2 fsdp=2 tensor=2", "spion+fst/context=4"]
_REST = sorted({*list_runs()} - {*_CHOSEN} - {f"resume/{name}" for name in RESUMED})
_HELD = {"fsdp=8": 0.2, "data=2 fsdp=4": 0.33, "data=2 fsdp=2 tensor=2": 0.33, "context=4": 1.0}


_run = functools.partial(run_program, "tests.sharding.mesh_runs")


def _check(name, found):
    recipe, _, mesh = name.partition("/")
    # Where gradients choose what grows, a rounding may choose otherwise.
    tolerance = 1e-4 if recipe == "rigl" else 1e-6
    assert found["loss"] <= tolerance
    assert found["leaf"] <= tolerance
    assert found["masks"] <= (1e-3 if recipe == "rigl" else 0)
    if mesh in _HELD:
        assert found["held"] <= _HELD[mesh]


@pytest.mark.slow
def test_parts_of_a_batch_a_state_and_a_layer():
    name = f"{SHORT}/data=2 fsdp=2 tensor=2"
    _check(name, _run(name)[name])


@pytest.fixture(scope="module")
def chosen():
    return _run(*_CHOSEN)


@pytest.mark.ci
@pytest.mark.parametrize("name", _CHOSEN)
def test_recipes(name, chosen):
    _check(name, chosen[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", _REST)
def test_every_recipe_on_every_mesh(name):
    _check(name, _run(name)[name])


@pytest.mark.parametrize(
    "name", tier({n: n for n in RESUMED}, fast=(), slow={*RESUMED} - {"4 to 8"})
)
def test_a_run_goes_on_on_other_devices(name):
    found = _run(f"resume/{name}")[f"resume/{name}"]
    assert found["restored"] == 0
    _check("fst", found)
    if name == "8 to 8":
        assert found["loss"] == found["leaf"] == 0
