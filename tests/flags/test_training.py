"""Runs from the first step to the last, across changes of phase, under JAX's flags."""

import pytest

from tests.flags.flags import assert_narrow, flags_set
from tests.flags.recipes import make_settings
from tests.training.runs import load_end, train

pytestmark = pytest.mark.ci


def test_strict_types_ranks_and_transfers(tmp_path):
    settings = make_settings(tmp_path, "spion+fst")
    with flags_set("x64", "rank_promotion", "transfer_guard", "bfloat16"):
        train(settings, tmp_path / "run")
        state, _ = load_end(settings, tmp_path / "run")
    assert_narrow(state, "state")


@pytest.mark.parametrize("name", ["rigl", "spion+fst"])
def test_nothing_of_ours_is_nan(tmp_path, name):
    with flags_set("debug_nans"):
        train(make_settings(tmp_path, name), tmp_path / "run")
