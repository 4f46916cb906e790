"""Runs from the first step to the last, across changes of phase, under JAX's flags."""

import itertools

import pytest

from tests.flags.flags import assert_narrow, flags_set
from tests.flags.recipes import RECIPES, make_settings
from tests.training.runs import load_end, train

pytestmark = pytest.mark.ci


# `test_recipes` traces every recipe. Of whole runs, each push has the one with most in it.
_WHOLE = ("spion+fst",)


def _mark(name, precision):
    return pytest.param(name, precision, marks=() if name in _WHOLE else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "precision"), [*map(_mark, RECIPES, itertools.cycle(["bfloat16", "highest"]))]
)
def test_runs_are_narrow_finite_and_transfer_nothing_unasked(tmp_path, name, precision):
    settings = make_settings(tmp_path, name)
    with flags_set("x64", "rank_promotion", "transfer_guard", "debug_nans", precision):
        train(settings, tmp_path / "run")
        state, _ = load_end(settings, tmp_path / "run")
    assert_narrow(state, "state")
