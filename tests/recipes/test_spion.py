"""SPION's switch test on constructed maps with distances worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import spion_pattern
from sparsejax.recipes import SpionConfig, make_spion
from sparsejax.report.metrics import fetch_metrics

LAYERS, LENGTH, BLOCK = 2, 32, 8
BASE = SpionConfig(
    block_size=BLOCK,
    filter_size=5,
    quantile=0.7,
    probe_interval_fraction=0.1,
    num_layers=LAYERS,
    num_heads=3,
    length=LENGTH,
    num_steps=100,
)

OFF = dataclasses.replace(BASE, keep_map_at_second_check=False)
MASKS = {"blocks": {"block_mask": np.ones((LAYERS, 1, 1, 4, 4), bool)}, "other": np.ones(3, bool)}


@functools.cache
def observe_jitted(config):
    recipe = make_spion(config)
    return jax.jit(lambda sparsity, maps: recipe.observe(sparsity, maps, recipe.phases[0]))


def make_maps(*levels):
    """Maps that are constant per layer: two of levels a and b are |a - b| apart."""
    return jnp.stack([jnp.full((LENGTH, LENGTH), level / LENGTH) for level in levels])


def run_checks(config, *levels):
    """Show the recipe one map after the other; a level is a number or one per layer."""
    sparsity = make_spion(config).init(MASKS, {}, jax.random.key(0))
    observations = []
    for level in levels:
        maps = make_maps(*np.broadcast_to(level, LAYERS))
        sparsity, observation = observe_jitted(config)(sparsity, maps)
        observations.append(observation._replace(metrics=fetch_metrics(observation.metrics)))
    return sparsity, observations


def switches(config, *levels):
    return [bool(o.change_phase) for o in run_checks(config, *levels)[1]]


def distances(config, *levels):
    _, observations = run_checks(config, *levels)
    assert "distance" not in observations[0].metrics, "there is nothing to compare with"
    return [round(o.metrics["distance"][0], 3) for o in observations[1:]]


def test_the_second_check_keeps_the_remembered_map_if_asked():
    levels = (10, 50, 20, 80)
    # Check 2 measures |50 - 10|. The released code goes on remembering 10, hence |20 - 10|.
    assert distances(BASE, *levels) == [40, 10, 60]
    assert distances(OFF, *levels) == [40, 30, 60]


def test_the_change_is_relative_to_the_distance_before():
    _, observations = run_checks(BASE, 10, 50, 20, 80)
    percents = [o.metrics.get("change_percent", [None])[0] for o in observations]
    assert percents[:2] == [None, None]
    np.testing.assert_allclose(percents[2:], [75, 500], rtol=1e-5)
    assert [int(o.metrics["check"]) for o in observations] == [1, 2, 3, 4]


def test_the_first_two_checks_never_switch():
    # The same distance at checks 2 and 3 switches at the third, and not before.
    assert switches(BASE, 0, 100, 100) == [False, False, True]
    assert switches(OFF, 0, 100, 200) == [False, False, True]
    assert switches(BASE, 100, 100, 100) == [False, False, False]


@pytest.mark.parametrize(
    ("level", "switch"), [(114.99, True), (115.0, False), (85.01, True), (85.0, False)]
)
def test_the_threshold_itself_does_not_switch(level, switch):
    assert switches(BASE, 0, 100, level)[-1] is switch


def test_every_layer_has_to_settle():
    assert not switches(BASE, 0, 100, (100, 120))[-1]
    assert not switches(BASE, 0, 100, (120, 100))[-1]
    assert switches(BASE, 0, 100, (100, 110))[-1]


def test_identical_maps_have_no_relative_change_and_do_not_switch():
    assert distances(BASE, 7, 7, 7, 7) == [0, 0, 0]
    assert switches(BASE, 7, 7, 7, 7) == [False] * 4
    _, observations = run_checks(OFF, (7, 7), (7, 9), (12, 14))
    # Beside a distance of 0 a change is no number: 0 / 0, or infinite. The other layer has one.
    assert observations[2].metrics["change_percent"] == [None, pytest.approx(150)]
    # From 0 to 5 is an infinite change; from 5 to 5 on it is none.
    assert switches(OFF, 7, 7, 12, 17) == [False, False, False, True]


def draw_maps(seed, causal=False):
    maps = np.random.default_rng(seed).random((LAYERS, LENGTH, LENGTH), np.float32)
    return jnp.asarray(np.tril(maps) if causal else maps)


@pytest.mark.parametrize(
    "variant", ["cf", *(pytest.param(v, marks=pytest.mark.ci) for v in ("c", "f"))]
)
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_the_sparse_phase_takes_the_pattern_of_the_last_map(variant, causal):
    settings = {
        "c": {"quantile": None, "density": 0.8},
        "f": {"filter_size": 31},
    }.get(variant, {})
    config = dataclasses.replace(BASE, variant=variant, causal=causal, **settings)
    recipe = make_spion(config)
    sparsity = recipe.init(MASKS, {}, jax.random.key(0))
    for seed in (1, 2):
        sparsity, _ = observe_jitted(config)(sparsity, draw_maps(seed, causal))
    pooled = sparsity.statistics["pooled"]
    sparsity = recipe.enter_phase(sparsity, recipe.phases[1], previous=recipe.phases[0])

    expected = spion_pattern(
        draw_maps(2, causal),
        block_size=BLOCK,
        quantile=config.quantile,
        filter_size=5,
        variant=variant,
        density=config.density,
        causal=causal,
    )
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(sparsity.masks["blocks"]["block_mask"][:, 0, 0], expected)
    np.testing.assert_array_equal(sparsity.masks["other"], MASKS["other"])
    # The big map is gone; what the pictures need stays.
    assert set(sparsity.statistics) == {"pooled"}
    np.testing.assert_array_equal(sparsity.statistics["pooled"], pooled)


@pytest.mark.parametrize("walk", ["greedy", pytest.param("flood", marks=pytest.mark.ci), None])
def test_a_density_takes_the_place_of_the_quantile_and_what_walks_cannot_reach_is_told(walk):
    settings = {"quantile": None, "density": 1.0, "walk": walk, "causal": True}
    config = dataclasses.replace(BASE, **settings)
    recipe = make_spion(config)
    dense, sparse = recipe.phases
    sparsity = recipe.init(MASKS, {}, jax.random.key(0))
    assert recipe.phase_metrics(sparsity, dense) == {}
    maps = np.tril(np.ones((LENGTH, LENGTH), np.float32)) + 9 * np.eye(LENGTH, dtype=np.float32)
    sparsity, _ = observe_jitted(config)(sparsity, jnp.array([maps, maps]))
    sparsity = recipe.enter_phase(sparsity, sparse, previous=dense)
    kept = np.array(sparsity.masks["blocks"]["block_mask"]).sum((1, 2, 3, 4))
    values = fetch_metrics(recipe.phase_metrics(sparsity, sparse))
    if walk != "greedy":
        assert kept.tolist() == [10, 10] and values == {} and not recipe.phase_warnings(values)
        return
    assert (kept < 10).all() and values["wanted_density"] == 1
    np.testing.assert_allclose(values["reach"], kept / 10, rtol=1e-6)
    (warning,) = recipe.phase_warnings(values)
    assert warning == (
        f"greedy walks reach {min(values['reach']):.3f} of the visible blocks, and "
        "recipe.spion.density=1.0 asks for 1 of them; layers [0, 1] keep less. "
        "recipe.spion.walk='flood' reaches all."
    )
    # The same count is enough, whatever its share is rounded to.
    assert not recipe.phase_warnings({"reach": [0.9999, 1.0]})
    assert "layers [1]" in recipe.phase_warnings({"reach": [1.0, 0.8]})[0]


def test_what_the_phases_are():
    dense, sparse = make_spion(BASE).phases
    assert (dense.name, sparse.name) == ("dense", "sparse")
    assert (dense.sparse_attention, sparse.sparse_attention) == (False, True)
    assert (dense.probe_every_steps, sparse.probe_every_steps) == (10, None)
    assert dense.last_step is None and sparse.last_step is None
    assert sparse.pruned_logits == "zero"
    assert sparse.learning_rate == "restart" and dense.learning_rate == "schedule"

    changed = dataclasses.replace(
        BASE, restart_learning_rate=False, pruned_logits="masked", latest_switch_fraction=0.32
    )
    dense, sparse = make_spion(changed).phases
    # The check after a third of the run.
    assert dense.last_step == 40
    assert (sparse.pruned_logits, sparse.learning_rate) == ("masked", "schedule")
    # As the released code: without convolution the schedule is not restarted.
    assert (
        make_spion(dataclasses.replace(BASE, variant="f", filter_size=31)).phases[1].learning_rate
        == "schedule"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "fc"}, "variant must be 'cf', 'c' or 'f', got 'fc'"),
        ({"quantile": 1.0}, "quantile must be in (0, 1) for variant 'cf' without density, got 1.0"),
        ({"density": 0.5}, "quantile must be None for variant 'cf' with density=0.5, got 0.7"),
        (
            {"density": 0.2, "quantile": None},
            "density must be in [0.25, 1] for variant 'cf', which keeps the diagonal, got 0.2",
        ),
        ({"walk": "drunken"}, "walk must be 'greedy', 'flood' or None, got 'drunken'"),
        (
            {"variant": "c", "density": 0.5, "quantile": None, "walk": "flood"},
            "walk must be None with variant='c', which has no use for it, got 'flood'",
        ),
        (
            {"variant": "c"},
            "density must be in [0.25, 1] for variant 'c', which keeps the diagonal, got None",
        ),
        (
            {"variant": "c", "density": 0.3, "causal": True},
            "density must be in [0.4, 1] for variant 'c', which keeps the diagonal, got 0.3",
        ),
        ({"filter_size": 4}, "filter_size must be odd and positive, got 4"),
        ({"probe_interval_fraction": 0}, "probe_interval_fraction must be in (0, 1), got 0"),
        ({"max_change_percent": 0}, "max_change_percent must be positive, got 0"),
        ({"pruned_logits": "none"}, "pruned_logits must be 'masked' or 'zero', got 'none'"),
        (
            {"latest_switch_fraction": 1.0},
            "latest_switch_fraction must be in (0, 1) or None, got 1.0",
        ),
        (
            {"probe_interval_fraction": 0.4, "latest_switch_fraction": 0.9},
            "latest_switch_fraction must be at or before the last check, after step 80 of 100 with "
            "probe_interval_fraction=0.4, got 0.9",
        ),
        ({"block_size": 12}, "block_size must be a divisor of the sequence length 32, got 12"),
        ({"block_size": 0}, "block_size must be positive, got 0"),
        ({"length": 0}, "length must be positive, got 0"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(BASE, **settings)
    assert str(error.value) == f"recipe.spion.{message}"
