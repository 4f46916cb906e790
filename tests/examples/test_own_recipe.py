"""The example of a method of one's own does what Top-KAST does, and its FLOPs are counted right."""

import numpy as np
import pytest

import sparsejax
from examples import own_recipe
from sparsejax.checkpoint.workdir import read_run
from sparsejax.recipes import get_weight_masks
from sparsejax.strict_json import load_json
from tests.training.runs import load_end, make_settings

_STEPS = 12
_SETTINGS = {
    "num_steps": _STEPS,
    "eval_every_steps": _STEPS,
    "optimizer__warmup_fraction": 1 / _STEPS,
    "optimizer__weight_decay": 0.0,
    "recipe__own__sparse_weights": "mlp/.*=unstructured",
}


@pytest.mark.slow
def test_top_kast_trains_more_weights_than_it_shows(tmp_path):
    settings = make_settings(tmp_path, **_SETTINGS)
    summary = sparsejax.train(settings, tmp_path / "run", recipe=own_recipe.make_top_kast)
    assert summary["recipe"] == "top-kast"

    recorded = read_run(tmp_path / "run").config.to_dict()
    assert recorded["recipe"]["name"] == "examples.own_recipe:make_top_kast"
    state, _ = load_end(recorded, tmp_path / "run")
    shown = get_weight_masks(state.sparsity.masks)
    trained = get_weight_masks(state.sparsity.statistics["trained"])
    assert shown.keys() == trained.keys() == {"mlp/up", "mlp/down"}
    for name, mask in shown.items():
        np.testing.assert_allclose(np.mean(mask), own_recipe.DENSITY, atol=1e-3)
        np.testing.assert_allclose(np.mean(trained[name]), 0.4, atol=1e-3)
        assert not (mask & ~trained[name]).any()

    # y and dx at the density of A, dW at that of B, of the feed-forward layers alone.
    entry = load_json((tmp_path / "run" / "flops.json").read_text())["sparse"]
    layer = 2 * 2 * 32 * 64 * 64 * 4 * _STEPS  # up and down, 4 x 64 tokens
    whole = {
        p: sum(v for n, v in entry[p].items() if "layer" in n) for p in ("forward", "backward")
    }
    dense = sum(v for n, v in entry["dense_equivalent"].items() if "layer" in n)
    saved = 2 * layer * ((1 - 0.2) + (1 - 0.2) + (1 - 0.4))
    np.testing.assert_allclose(dense - sum(whole.values()), saved, rtol=2e-3)


@pytest.mark.slow
def test_only_weights_of_the_larger_set_move(tmp_path, monkeypatch):
    monkeypatch.setattr(own_recipe, "REFRESH_STEPS", 10 * _STEPS)
    ends = {}
    for steps in (2, _STEPS):
        changes = {"num_steps": steps, "eval_every_steps": steps}
        settings = make_settings(tmp_path, **_SETTINGS | changes, optimizer__schedule="constant")
        sparsejax.train(settings, tmp_path / str(steps), recipe=own_recipe.make_top_kast)
        recorded = read_run(tmp_path / str(steps)).config.to_dict()
        ends[steps], _ = load_end(recorded, tmp_path / str(steps))
    up = [np.asarray(ends[s].params["blocks"]["mlp"]["up"]["kernel"]) for s in (2, _STEPS)]
    trained = np.asarray(get_weight_masks(ends[2].sparsity.statistics["trained"])["mlp/up"])
    moved = up[0] != up[1]
    assert moved[trained].mean() > 0.99 and not moved[~trained].any()
