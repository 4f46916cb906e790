"""When SAT switches, what it fits, and what it leaves behind, on constructed maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sat
from sparsejax.config.parse import parse_config
from sparsejax.masks import magnitude_mask, pool_attention, sat_pattern
from sparsejax.optimizer import compute_b1, compute_learning_rate, make_optimizer
from sparsejax.recipes import SatConfig, make_sat
from sparsejax.report.metrics import fetch_metrics

LAYERS, LENGTH, BLOCK = 2, 16, 4
BLOCKS = LENGTH // BLOCK


def make(**changes):
    options = {"density": 0.3, "num_layers": LAYERS, "length": LENGTH, "block_size": BLOCK}
    sizes = {"num_heads": 3, "head_dim": 8, "num_steps": 10}
    return make_sat(SatConfig(**options | sizes | changes))


def begin(recipe):
    mask = jnp.ones((LAYERS, 1, 1, BLOCKS, BLOCKS), bool)
    return recipe.init({"blocks": {"attention": {"block_mask": mask}}}, {}, jax.random.key(0))


def peaked(height, layers=LAYERS):
    """Maps whose skewness grows with the height of a single peak."""
    base = np.random.default_rng(3).uniform(size=(LENGTH, LENGTH)) / LENGTH
    base[0, 0] = height
    return np.broadcast_to(base, (layers, LENGTH, LENGTH)).astype(np.float32)


def walk(recipe, distances, *, skewed=(True, True)):
    """Show maps that move by these distances and return the observations."""
    sparsity, maps, seen = begin(recipe), np.array(peaked(5.0)), []
    for layer, tall in enumerate(skewed):
        if not tall:
            maps[layer] = np.random.default_rng(layer).uniform(size=(LENGTH, LENGTH))
    observe = jax.jit(recipe.observe, static_argnums=2)
    for distance in distances:
        maps = maps.copy()
        maps[:, 1, 1] += np.asarray(distance)
        sparsity, observation = observe(sparsity, maps, recipe.phases[0])
        seen.append(observation._replace(metrics=fetch_metrics(observation.metrics)))
    return sparsity, seen


def changes(observations):
    return [bool(o.change_phase) for o in observations]


def test_it_switches_when_distances_stop_changing():
    _, seen = walk(make(), [0.0, 0.5, 0.25, 0.2, 0.201, 0.3])
    # 0.2 -> 0.201 is 0.5 %, below 1.3 %; 0.201 -> 0.3 is not.
    assert changes(seen) == [False, False, False, False, True, False]
    np.testing.assert_allclose(seen[4].metrics["distance"], 0.201, rtol=1e-3)
    np.testing.assert_allclose(seen[4].metrics["change_percent"], 0.5, rtol=2e-2)
    assert [sorted(o.metrics) for o in seen[:3]] == [
        ["skewness"],
        ["distance", "skewness"],
        ["change_percent", "distance", "skewness"],
    ]


def test_the_first_probes_cannot_switch():
    # Equal distances from the start: the first compares with nothing, the second with no distance.
    assert changes(walk(make(), [0.1, 0.1, 0.1])[1]) == [False, False, True]
    # A map that did not move leaves no distance to divide by.
    assert changes(walk(make(), [0.1, 0.0, 0.0, 0.1])[1]) == [False] * 4


def test_every_layer_has_to_be_ripe():
    steady = [0.1] * 4
    assert changes(walk(make(), steady)[1])[-1]
    assert not any(changes(walk(make(), steady, skewed=(True, False))[1]))
    assert changes(walk(make(min_skewness=-5.0), steady, skewed=(True, False))[1])[-1]
    # One layer moves ever faster.
    moving = [np.array([0.1, 0.1 * 2.0**n]) for n in range(4)]
    assert not any(changes(walk(make(), moving)[1]))


def test_maps_may_be_averaged_over_probes():
    recipe = make(map_decay=0.75)
    sparsity = begin(recipe)
    first, second = peaked(5.0), peaked(1.0)
    for maps in (first, second):
        sparsity, _ = recipe.observe(sparsity, maps, recipe.phases[0])
    averaged = 0.75 * first + 0.25 * second
    np.testing.assert_allclose(sparsity.statistics["map_before"], averaged, rtol=1e-5)
    pooled = pool_attention(jnp.asarray(averaged), block_size=BLOCK, filter_size=None)
    np.testing.assert_allclose(sparsity.statistics["pooled"], pooled, rtol=1e-5)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_the_pattern_is_fitted_to_the_pooled_map(causal):
    recipe = make(causal=causal)
    sparsity, maps = begin(recipe), peaked(2.0)
    pattern = sparsity.params["pattern"]
    assert pattern.shape == (LAYERS, BLOCKS, 8) and pattern.min() >= 0 and pattern.max() < 1

    def loss(pattern, maps):
        changed = dataclasses.replace(sparsity, params={"pattern": pattern})
        return recipe.auxiliary_loss(changed, maps, recipe.phases[0])

    value, (gradient, map_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(pattern, maps)
    pooled = maps.reshape(LAYERS, BLOCKS, BLOCK, BLOCKS, BLOCK).mean((2, 4))
    visible = np.tril(np.ones((BLOCKS, BLOCKS))) if causal else np.ones((BLOCKS, BLOCKS))
    error = (np.einsum("lid,ljd->lij", pattern, pattern) - pooled) * visible
    np.testing.assert_allclose(value, 0.01 * LAYERS * (error**2).sum() / visible.sum(), rtol=1e-5)
    both = error + error.swapaxes(1, 2)
    expected = 0.02 * LAYERS / visible.sum() * np.einsum("lij,ljd->lid", both, pattern)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert not map_gradient.any(), "nothing reaches the model through its map"


def test_between_probes_the_last_map_is_fitted():
    recipe = make(probe_every_steps=5)
    sparsity, phase = begin(recipe), recipe.phases[0]
    assert recipe.auxiliary_loss(sparsity, None, phase) == 0, "nothing has been seen yet"
    maps = jnp.asarray(peaked(2.0))
    sparsity, _ = recipe.observe(sparsity, maps, phase)
    between = recipe.auxiliary_loss(sparsity, None, phase)
    np.testing.assert_allclose(between, recipe.auxiliary_loss(sparsity, maps, phase), rtol=1e-6)
    assert recipe.auxiliary_loss(sparsity, None, recipe.phases[1]) == 0


def test_the_sparse_phase_has_the_learned_pattern_and_a_fresh_optimizer():
    recipe = make()
    sparsity, _ = walk(recipe, [0.1] * 3)
    after = recipe.enter_phase(sparsity, recipe.phases[1], previous=recipe.phases[0])
    expected = sat_pattern(sparsity.params["pattern"], density=0.3)
    np.testing.assert_array_equal(
        after.masks["blocks"]["attention"]["block_mask"][:, 0, 0], expected
    )
    assert set(after.statistics) == {"pooled", "untrained_share"}, "the maps are gone"
    np.testing.assert_array_equal(after.params["pattern"], sparsity.params["pattern"])
    sparse = recipe.phases[1]
    assert (sparse.learning_rate, sparse.learning_rate_scale) == ("constant", 0.5)
    assert sparse.reset_optimizer and sparse.pruned_logits == "zero"
    goes_on = make(continue_schedule=True, latest_switch_fraction=0.7).phases
    assert (goes_on[1].learning_rate, goes_on[1].reset_optimizer) == ("schedule", False)
    assert goes_on[0].last_step == 7


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_the_sparse_phase_says_how_much_of_its_pattern_is_that_of_the_untrained_w(causal):
    recipe = make(causal=causal)
    sparsity, _ = walk(recipe, [0.1])
    dense, sparse = recipe.phases
    assert recipe.phase_metrics(sparsity, dense) == {}
    untrained = sparsity.params["pattern"]
    # The first layer has not moved, the second has learned the blocks that it had not kept.
    learned = untrained.at[1].set(np.random.default_rng(1).normal(size=untrained.shape[1:]))
    moved = dataclasses.replace(sparsity, params={"pattern": learned})
    after = recipe.enter_phase(moved, sparse, previous=dense)
    before, now = (
        np.asarray(sat_pattern(w, density=0.3, causal=causal)) for w in (untrained, learned)
    )
    shares = recipe.phase_metrics(after, sparse)["untrained_share"]
    np.testing.assert_allclose(shares, (before & now).sum((1, 2)) / now.sum((1, 2)), rtol=1e-6)
    assert shares[0] == 1 and shares[1] < 1


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "untrained", "found"),
    [
        ({}, (35, 40), (9, 5)),
        ({"pattern_init_scale": 0.1, "pattern_rate_scale": 10.0}, (21, 12), (31, 34)),
    ],
    ids=["published", "ours"],
)
def test_at_the_published_switch_most_blocks_are_those_of_the_untrained_w(
    changes, untrained, found
):
    settings = parse_config(sat.get_config("image").to_dict())
    optimizer = make_optimizer(settings.optimizer, num_steps=settings.num_steps)
    blocks = 32
    sizes = {"num_layers": 2, "length": 1024, "block_size": 32, "num_heads": 2, "head_dim": 32}
    recipe = make_sat(SatConfig(density=0.05, num_steps=settings.num_steps, **sizes, **changes))
    mask = jnp.ones((2, 1, 1, blocks, blocks), bool)
    sparsity = recipe.init({"block_mask": mask}, {}, jax.random.key(0))
    # Near blocks, some columns, noise.
    rng, i = np.random.default_rng(7), np.arange(blocks)
    logits = 2 * rng.normal(size=(2, 1, blocks)) + rng.normal(size=(2, blocks, blocks))
    pooled = jax.nn.softmax(jnp.asarray(logits - abs(i[:, None] - i) / 3, jnp.float32)) / 32
    statistics = sparsity.statistics | {"pooled": pooled, "num_checks": jnp.int32(1)}
    sparsity = dataclasses.replace(sparsity, statistics=statistics)
    dense, sparse = recipe.phases

    def step(carry, i):
        params, opt_state = carry

        def loss(params):
            return recipe.auxiliary_loss(dataclasses.replace(sparsity, params=params), None, dense)

        weights = {"recipe": params}
        rate, b1 = (f(optimizer, dense, i, 0) for f in (compute_learning_rate, compute_b1))
        grads = optimizer.clip({"recipe": jax.grad(loss)(params)})
        updates, opt_state = optimizer.update(grads, opt_state, weights, b1=b1)
        updates = recipe.transform_updates(updates, sparsity, dense)["recipe"]
        return (jax.tree.map(lambda w, u: w + rate * u, params, updates), opt_state), None

    start = sparsity.params, optimizer.init({"recipe": sparsity.params})
    (params, _), _ = jax.lax.scan(step, start, jnp.arange(254))
    trained = dataclasses.replace(sparsity, params=params)
    after = recipe.enter_phase(trained, sparse, previous=dense)
    kept = np.asarray(after.masks["block_mask"][:, 0, 0])
    shares = recipe.phase_metrics(after, sparse)["untrained_share"]
    np.testing.assert_allclose(51 * shares, untrained, atol=2.5)
    largest = jax.vmap(lambda r: magnitude_mask(r + r.T, 51))(pooled)
    np.testing.assert_allclose((kept & largest).sum((1, 2)), found, atol=2.5)


def test_w_may_begin_small_and_learn_at_a_rate_of_its_own():
    published, ours = make(), make(pattern_init_scale=0.25, pattern_rate_scale=8.0)
    pattern = begin(published).params["pattern"]
    np.testing.assert_array_equal(begin(ours).params["pattern"], 0.25 * pattern)
    updates = {"model": {"kernel": jnp.ones(2)}, "recipe": {"pattern": jnp.full(3, -0.5)}}
    same = published.transform_updates(updates, begin(published), published.phases[0])
    assert same is updates
    scaled = ours.transform_updates(updates, begin(ours), ours.phases[0])
    np.testing.assert_array_equal(scaled["recipe"]["pattern"], np.full(3, -4.0))
    np.testing.assert_array_equal(scaled["model"]["kernel"], np.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.05}, r"recipe.sat.density must be .* one of 16 visible blocks, got .*0.05"),
        ({"density": 1.01}, "recipe.sat.density must be at most 1"),
        ({"block_size": 5}, "block_size must be a divisor of the sequence length 16, got 5"),
        ({"max_change_percent": 0.0}, "max_change_percent must be positive, got 0.0"),
        ({"map_decay": 1.0}, r"map_decay must be in \[0, 1\), got 1.0"),
        ({"probe_every_steps": 0}, "probe_every_steps must be positive, got 0"),
        ({"pattern_dim": 0}, "pattern_dim must be positive or None, got 0"),
        ({"pattern_init_scale": 0.0}, "pattern_init_scale must be positive, got 0.0"),
        ({"pattern_rate_scale": -1.0}, "pattern_rate_scale must be positive, got -1.0"),
        ({"pruned_logits": "none"}, "pruned_logits must be 'masked' or 'zero', got 'none'"),
        ({"latest_switch_fraction": 0}, r"latest_switch_fraction must be in \(0, 1\) or None, got"),
        (
            {"latest_switch_fraction": 0.999},
            "latest_switch_fraction must be small enough to leave a sparse step of .*, got 0.999",
        ),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
