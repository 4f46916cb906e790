"""SAT through the loop: it switches, resumes with the same bits, and says what it waits for."""

import jax
import numpy as np
import pytest

from sparsejax.masks import count_kept_blocks
from sparsejax.recipes import get_attention_masks
from sparsejax.report.metrics import read_metrics
from sparsejax.report.progress import format_summary
from tests.training.runs import (
    NUM_STEPS,
    assert_documented,
    copy_until,
    load_end,
    make_settings,
    train,
)

pytestmark = pytest.mark.ci

_SWITCH = 6
_SAT = {
    "recipe__name": "sat",
    "recipe__sat__density": 0.5,
    "recipe__sat__latest_switch_fraction": _SWITCH / NUM_STEPS,
    # The maps of so small a model are never that skewed: only the latest step ends the phase.
    "recipe__sat__min_skewness": 1e9,
    "checkpoint__keep_last": 10,
    "checkpoint__every_steps": 3,
}


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    settings = make_settings(tmp_path_factory.mktemp("corpus"), **_SAT)
    workdir = tmp_path_factory.mktemp("sat")
    with jax.debug_nans(True):
        return settings, workdir, train(settings, workdir)


def _rows(workdir, kind):
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == kind]


def test_every_dense_step_is_probed_and_the_sparse_phase_has_the_density(trained):
    settings, workdir, summary = trained
    assert_documented(workdir)
    probes = _rows(workdir, "probe")
    assert [row["step"] for row in probes] == list(range(1, _SWITCH + 1))
    assert all(len(row["skewness"]) == 2 for row in probes)
    assert "distance" not in probes[0] and "change_percent" not in probes[1]
    assert np.isfinite(probes[2]["change_percent"]).all()
    state, _ = load_end(settings, workdir)
    kept = np.asarray(get_attention_masks(state.sparsity.masks)).sum((1, 2))
    np.testing.assert_array_equal(kept, count_kept_blocks(4, density=0.5, causal=True))
    assert summary["sparse_first_step"] == _SWITCH
    assert summary["sparse_attention_density"] == pytest.approx(0.5)
    began = [row.get("phase_metrics", {}) for row in _rows(workdir, "phase")]
    assert began[0] == {} and summary["phase_metrics"] == {"sparse": began[1]}
    assert len(began[1]["untrained_share"]) == 2
    assert all(0 <= share <= 1 for share in began[1]["untrained_share"])
    shown = ", ".join(f"{share:.3g}" for share in began[1]["untrained_share"])
    lines = format_summary(summary, {}, phases=("dense", "sparse")).splitlines()
    assert f"  sparse phase       began with untrained share [{shown}]" in lines
    # Dense steps are timed although each of them probes.
    timed = [row for row in _rows(workdir, "train") if "step_seconds" in row]
    assert {row["phase"] for row in timed} == {"dense", "sparse"}


def test_after_the_switch_the_rate_is_constant_and_the_pattern_frozen(trained):
    settings, workdir, _ = trained
    rates = [r["learning_rate"] for r in _rows(workdir, "train") if r["phase"] == "sparse"]
    np.testing.assert_allclose(rates, 0.5 * settings["optimizer"]["learning_rate"], rtol=1e-6)
    before, after = (
        load_end({**settings, "num_steps": step}, copy_until(workdir, step, workdir / f"at{step}"))[
            0
        ]
        for step in (9, settings["num_steps"])
    )
    np.testing.assert_array_equal(
        before.sparsity.params["pattern"], after.sparsity.params["pattern"]
    )
    fresh = jax.tree.leaves(before.opt_state)[0]
    assert fresh == 9 - _SWITCH, "the optimizer began anew at the switch"


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), _SWITCH], ids=["dense", "at_the_switch"]
)
def test_resuming_is_bit_exact(step, trained, tmp_path):
    settings, workdir, _ = trained
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    (state, data), (expected, expected_data) = (load_end(settings, x) for x in (resumed, workdir))
    assert data == expected_data
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)

    def seen(folder):
        return repr([(r["step"], r["skewness"], r.get("distance")) for r in _rows(folder, "probe")])

    assert seen(resumed) == seen(workdir)


@pytest.mark.slow
def test_a_switch_that_does_not_come_is_spoken_of(tmp_path, capsys):
    changes = {"recipe__sat__latest_switch_fraction": None, "recipe__sat__probe_every_steps": 4}
    settings = make_settings(tmp_path, **_SAT | changes, recipe__sat__map_decay=0.5)
    summary = train(settings, tmp_path / "run")
    shown = capsys.readouterr().out
    waits = "every layer's map has a skewness of at least 1e+09 and a distance"
    for percent in (50, 90):
        assert (
            f"after {percent} % of the run phase 'dense' goes on: it waits until {waits}" in shown
        )
    assert f"never began: it waited until {waits}" in shown
    assert summary["waited_until"].startswith(waits)
    assert [row["step"] for row in _rows(tmp_path / "run", "probe")] == [4, 8]
