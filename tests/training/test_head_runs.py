"""Runs whose heads have attention blocks of their own: they switch, resume, load and are drawn."""

import jax
import numpy as np
import pytest

from sparsejax.recipes import get_attention_masks
from sparsejax.report.metrics import read_metrics
from tests.training.runs import assert_documented, copy_until, load_end, make_settings, train

pytestmark = pytest.mark.slow

_SWITCH = 6
_SHARED = {"model__num_heads": 4, "model__num_kv_heads": 2, "checkpoint__every_steps": 3}
_SHARED |= {"checkpoint__keep_last": 10}
_RUNS = {
    "spion": {
        "recipe__spion__per_head": True,
        "recipe__spion__variant": "c",
        "recipe__spion__quantile": None,
        "recipe__spion__density": 0.6,
    },
    "sat": {
        "recipe__name": "sat",
        "recipe__sat__per_head": True,
        "recipe__sat__density": 0.6,
        "recipe__sat__latest_switch_fraction": 0.6,
        "recipe__sat__min_skewness": 1e9,
    },
}


@pytest.fixture(name="trained", scope="module", params=_RUNS)
def _trained(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    settings = make_settings(folder, **_SHARED | _RUNS[request.param])
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        return settings, folder / "run", train(settings, folder / "run")


def test_every_head_has_its_blocks(trained):
    settings, workdir, summary = trained
    assert_documented(workdir)
    state, _ = load_end(settings, workdir)
    kept = np.asarray(get_attention_masks(state.sparsity.masks))
    assert kept.shape == (2, 4, 4, 4)
    assert (kept.sum((2, 3)) == 6).all(), "of the ten blocks that are visible"
    assert any((head != layer[0]).any() for layer in kept for head in layer)
    assert summary["sparse_first_step"] == _SWITCH
    assert summary["sparse_attention_density"] == pytest.approx(0.6)
    (sparse,) = (
        row
        for row in read_metrics(workdir / "metrics.jsonl")
        if row["kind"] == "phase" and row["phase"] == "sparse"
    )
    assert sparse["layer_attention_density"] == pytest.approx([0.6, 0.6])
    assert (workdir / "attention_patterns.png").exists()


@pytest.mark.parametrize("step", [3, _SWITCH], ids=["dense", "at_the_switch"])
def test_resuming_is_bit_exact(step, trained, tmp_path):
    settings, workdir, _ = trained
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    (state, data), (expected, expected_data) = (load_end(settings, x) for x in (resumed, workdir))
    assert data == expected_data
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
