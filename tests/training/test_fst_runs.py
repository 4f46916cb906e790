"""FST and S-STE through the train step, the loop and the search for a decay rate."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.masks import decay_in_backward, soft_threshold_mask, transposable_mask
from sparsejax.models import sparse_weight_patterns
from sparsejax.patterns import NMPattern
from sparsejax.recipes import (
    FSTConfig,
    Phase,
    Recipe,
    get_weight_masks,
    make_dense,
    make_fst,
)
from sparsejax.recipes.weight_masks import map_sparse_weights
from sparsejax.report.metrics import read_metrics
from sparsejax.tools.find_decay import DecaySearch, find_decay, format_search
from tests.small_models import (
    assert_same,
    make_batch,
    make_config,
    make_small_optimizer,
    make_state,
    make_step,
)
from tests.training import toy
from tests.training.runs import (
    NUM_STEPS,
    assert_documented,
    copy_until,
    load_end,
    make_settings,
    train,
)

_MODEL = make_config(use_bias=False, sparse_weights=(("mlp/.*", NMPattern(transposable=True)),))
# Plain descent at a rate that does not begin at zero: a step shows its gradient.
_OPTIMIZER = make_small_optimizer(name="sgd", learning_rate=2.0)


@functools.cache
def _make(**changes):
    options = {"decay_rate": 0.0, "refresh_steps": 2, "num_steps": 12}
    return make_fst(FSTConfig(**options | changes, patterns=sparse_weight_patterns(_MODEL)))


def _state(recipe, model=_MODEL):
    return make_state(model, recipe, _OPTIMIZER)


def _step(recipe, phase=0, model=_MODEL, **options):
    return make_step(model, recipe, _OPTIMIZER, phase, **options)


@pytest.mark.ci
def test_a_sparse_step_is_one_of_masked_weights_trained_straight_through():
    recipe = _make()
    state = _state(recipe)

    def mask_weights(params, sparsity, phase):
        del phase

        def mask_straight_through(name, mask, w):
            del name
            return w + jax.lax.stop_gradient(jnp.where(mask, w, 0) - w)

        return map_sparse_weights(mask_straight_through, sparsity.masks, params)

    plain = Recipe("plain", (Phase("dense"),), transform_params=mask_weights)
    got, metrics = _step(recipe)(state, make_batch())
    expected, plain_metrics = _step(plain)(state, make_batch())
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    assert_same(got.params, expected.params, atol=1e-6)
    kernels = (s.params["blocks"]["mlp"]["up"]["kernel"] for s in (got, state))
    assert np.abs(np.subtract(*kernels)).max() > 1e-3, "the step does something"


@pytest.mark.ci
def test_the_dense_finish_is_dense_training_to_the_bit():
    recipe, dense = _make(), make_dense()
    state = _state(recipe)
    plain_model = dataclasses.replace(_MODEL, sparse_weights=())
    plain = dataclasses.replace(_state(dense, plain_model), params=state.params)
    finish, step = _step(recipe, phase=1), _step(dense, model=plain_model)
    for seed in range(3):
        state, metrics = finish(state, make_batch(seed))
        plain, expected = step(plain, make_batch(seed))
        assert_same((state.params, state.opt_state), (plain.params, plain.opt_state))
        assert metrics["loss"] == expected["loss"]


@pytest.mark.ci
def test_decay_and_refresh_in_one_compiled_step():
    recipe = _make(decay_rate=0.5)
    state, step = _state(recipe), _step(recipe)
    before = get_weight_masks(state.sparsity.masks)
    changed = []
    for seed in range(4):
        state, metrics = step(state, make_batch(seed))
        after = get_weight_masks(state.sparsity.masks)
        changed.append(any((after[name] != before[name]).any() for name in after))
        before = after
    assert not changed[0] and not changed[2] and changed[3]
    assert step._cache_size() == 1, "new masks compiled a new program"
    up = state.params["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(before["mlp/up"], transposable_mask(up))
    flips = [metrics[f"flip_rate/{name}"].value.mean() for name in ("mlp/up", "mlp/down")]
    np.testing.assert_allclose(metrics["flip_rate"].value, np.mean(flips), rtol=1e-5)

    undecayed = dataclasses.replace(
        state,
        sparsity=dataclasses.replace(
            state.sparsity,
            statistics=state.sparsity.statistics | {"decay_rate": jnp.float32(0)},
        ),
    )
    decayed, plain = step(state, make_batch(9))[0], step(undecayed, make_batch(9))[0]
    kernel, other = (s.params["blocks"]["mlp"]["up"]["kernel"] for s in (decayed, plain))
    moved = np.asarray(kernel != other)
    assert not moved[np.asarray(before["mlp/up"])].any(), "kept weights feel no decay"
    assert moved[~np.asarray(before["mlp/up"])].mean() > 0.9


def test_what_a_backward_pass_decays_is_clipped_with_the_gradient():
    kept = np.random.default_rng(1).random(toy.TABLE.shape) < 0.5

    def decay(params, sparsity, phase):
        return {"table": decay_in_backward(params["table"], jnp.asarray(kept), 0.5)}

    clipping = toy.DESCENT._replace(clip=lambda grads: jax.tree.map(lambda g: 0.1 * g, grads))
    recipe = toy.make_recipe(transform_params=decay)
    state, metrics = toy.run_step(recipe, optimizer=clipping)
    loss, gradient = toy.loss_and_gradient(toy.TABLE)
    gradient = gradient + 0.5 * np.where(kept, 0, toy.TABLE)
    toy.assert_close(metrics["loss"], loss)
    toy.assert_close(metrics["grad_norm"], np.sqrt((gradient**2).sum()))
    toy.assert_close(state.params["table"], toy.TABLE - 0.1 * gradient)


@pytest.mark.ci
def test_pruned_gradients_differ_by_step_and_micro_batch():
    recipe = _make(grad_pruning="mvue")
    state = _state(recipe)
    batch = make_batch()
    doubled = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
    one, two = _step(recipe), _step(recipe, num_micro_batches=2)
    params, again, halves = (
        step(state, b)[0].params["blocks"]["mlp"]["up"]["kernel"]
        for step, b in ((one, batch), (one, batch), (two, doubled))
    )
    np.testing.assert_array_equal(params, again)
    # Two micro-batches of the same examples draw twice; one draw alone would give `params`.
    assert (params != halves).any()


_FST = {
    "recipe__name": "fst",
    "recipe__fst__refresh_steps": 2,
    "recipe__fst__decay_rate": 1e-2,
    "recipe__fst__dense_fraction": 0.3,
    "recipe__fst__grad_pruning": "mvue",
    "checkpoint__keep_last": NUM_STEPS,
}


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    settings = make_settings(tmp_path_factory.mktemp("corpus"), **_FST)
    workdir = tmp_path_factory.mktemp("fst")
    with jax.debug_nans(True):
        return settings, workdir, train(settings, workdir)


@pytest.mark.ci
@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), 7], ids=["sparse", "at_the_switch"]
)
def test_resuming_is_bit_exact_across_refresh_and_switch(step, trained, tmp_path):
    settings, workdir, _ = trained
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    (state, data), (expected, expected_data) = (load_end(settings, x) for x in (resumed, workdir))
    assert data == expected_data
    assert_same(state, expected)

    def losses(folder):
        rows = read_metrics(folder / "metrics.jsonl")
        return [(r["step"], r["loss"], r.get("flip_rate")) for r in rows if r["kind"] == "train"]

    assert losses(resumed) == losses(workdir)


@pytest.mark.ci
def test_a_run_shows_its_flip_rates(trained):
    _, workdir, summary = trained
    assert_documented(workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    phases = {row["step"]: row["phase"] for row in rows if row["kind"] == "train"}
    assert phases[7] == "sparse" and phases[8] == "dense finish"
    searches = {row["step"]: row["flip_rate/mlp/up"] for row in rows if "flip_rate" in row}
    assert list(searches) == [2, 4, 6], "a row tells only what was found in its step"
    assert all(len(rates) == 2 for rates in searches.values())
    assert any(row.get("flip_rate", 0) > 0 for row in rows)
    assert (workdir / "flip_rates.png").stat().st_size > 5_000
    assert np.isfinite(summary["validation_loss"])
    assert summary["sparse_weight_density"] == 0.5
    assert {r.get("weight_density") for r in rows if r["kind"] == "train"} == {0.5, None}
    spared = summary["sparse_step_flops"] / summary["dense finish_step_flops"]
    expected = (7 * spared + 3) / 10
    assert spared < 1 and summary["training_flops_of_dense"] == pytest.approx(expected)


@pytest.mark.slow
def test_s_ste_masks_follow_the_weights(tmp_path):
    settings = make_settings(tmp_path, recipe__name="sste", recipe__sste__flip_interval_steps=2)
    with jax.debug_nans(True):
        train(settings, tmp_path / "run")
    state, _ = load_end(settings, tmp_path / "run")
    masks = get_weight_masks(state.sparsity.masks)
    assert set(masks) == {"mlp/up", "mlp/down"}
    for name, mask in masks.items():
        w = state.params["blocks"]["mlp"][name.removeprefix("mlp/")]["kernel"]
        np.testing.assert_array_equal(mask, soft_threshold_mask(w, axis=-2))


@pytest.mark.slow
def test_the_decay_rate_is_found(tmp_path):
    candidates = "1e-4 1e-1 10"
    settings = make_settings(
        tmp_path,
        **_FST | {"recipe__fst__decay_candidates": candidates},
        num_steps=20,
        optimizer__learning_rate=1e-2,
    )
    search = find_decay(parse_config(settings), tmp_path / "decay")
    assert list(search.flip_rates) == [1e-4, 1e-1, 10.0]
    assert (search.first_step, search.last_step) == (4, 12)
    assert search.dense_flip_rate > 0
    assert len(set(search.flip_rates.values())) == 3, "the rate reaches the compiled step"
    written = json.loads((tmp_path / "decay" / "find_decay.json").read_text())
    assert [c["mu"] for c in written["candidates"]] == [search.mu(r) for r in search.flip_rates]
    assert (tmp_path / "decay" / "find_decay.png").exists()


def test_a_search_says_what_it_would_choose():
    search = DecaySearch(
        first_step=20,
        last_step=60,
        dense_flip_rate=0.02,
        flip_rates={1e-5: 0.03, 1e-4: 0.018, 1e-3: 0.0165, 1e-2: 0.001},
        chosen=1e-3,
    )
    text = format_search(search)
    assert "0.001        0.01650     0.825   yes  <- chosen" in text
    assert "1e-05        0.03000     1.500   no" in text
    assert "--config.recipe.fst.decay_rate=0.001" in text
    none = dataclasses.replace(search, flip_rates={1e-5: 0.03}, chosen=None)
    assert "no rate is accepted: try larger ones" in format_search(none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe__name": "dense"}, "recipe.name must be 'fst', got 'dense'"),
        ({"recipe__fst__decay_candidates": "1e-4 x"}, "decay_candidates must be positive numbers"),
        ({}, "num_steps must be large enough for 10 sparse steps"),
        (
            {"recipe__fst__variant": "ste", "recipe__fst__decay_rate": 0.0},
            "recipe.fst.variant must be 'fst' or 'sr_ste', which decay, got 'ste'",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes, message, tmp_path):
    settings = make_settings(tmp_path, **_FST | changes)
    with pytest.raises(ConfigError, match=message):
        find_decay(parse_config(settings), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe__fst__sparse_weights": "mlp/gate=2:4"}, "'mlp/gate' matches none"),
        ({"recipe__fst__sparse_weights": "mlp/up"}, "must be 'regex=pattern; regex=pattern'"),
        ({"recipe__fst__sparse_weights": "mlp/up=5:4"}, "1 <= n <= m"),
        ({"recipe__fst__sparse_weights": ""}, "'regex=pattern' of at least one weight"),
        ({"recipe__fst__refresh_steps": 0}, "recipe.fst.refresh_steps must be at least 1"),
        ({"recipe__name": "sste", "recipe__sste__sparse_weights": "mlp/up=1:4"}, "must be 2:4"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, tmp_path):
    settings = make_settings(tmp_path, **_FST | changes)
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)
