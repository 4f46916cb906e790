"""FST and S-STE: masks found, refreshed and let go; decay where it belongs; weights shrunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    soft_threshold,
    soft_threshold_scale,
    transposable_mask,
)
from sparsejax.patterns import NMPattern
from sparsejax.recipes import (
    FSTConfig,
    SSTEConfig,
    get_weight_masks,
    make_fst,
    make_sste,
)
from sparsejax.report.metrics import fetch_metrics

L, K, N = 2, 8, 12
RATE, LEARNING_RATE = 0.25, 0.5
TRANSPOSABLE = {"mlp/up": NMPattern(n=2, m=4, transposable=True)}


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    up, down = {"kernel": normal(L, K, N), "bias": normal(L, N)}, {"kernel": normal(L, N, K)}
    return {"embedding": normal(5, K), "blocks": {"mlp": {"up": up, "down": down}}}


def make_masks():
    attention = {"block_mask": jnp.ones((L, 1, 1, 3, 3), bool)}
    return {
        "blocks": {
            "attention": attention,
            "mlp": {"up": {"kernel_mask": jnp.ones((L, K, N), bool)}},
        }
    }


def make(**changes):
    options = {"decay_rate": RATE, "refresh_steps": 3, "num_steps": 12, "patterns": TRANSPOSABLE}
    return make_fst(FSTConfig(**options | changes))


def up(tree):
    return tree["blocks"]["mlp"]["up"]


def mask_of(sparsity):
    return get_weight_masks(sparsity.masks)["mlp/up"]


def update(recipe, sparsity, params, step, phase=None):
    sparsity, params, _ = recipe.update(
        sparsity,
        params,
        None,
        None,
        step=jnp.int32(step),
        key=None,
        phase=recipe.phases[0] if phase is None else phase,
        learning_rate=jnp.float32(LEARNING_RATE),
    )
    return sparsity, params


@pytest.fixture(name="begun")
def _begun():
    recipe, params = make(), make_params()
    return recipe, params, recipe.init(make_masks(), params, jax.random.key(0))


def test_masks_are_there_before_the_first_step(begun):
    _, params, sparsity = begun
    np.testing.assert_array_equal(mask_of(sparsity), transposable_mask(up(params)["kernel"]))
    assert sparsity.masks["blocks"]["attention"]["block_mask"].all(), "not a weight"
    assert sparsity.statistics["flip_rates"]["mlp/up"].shape == (L,)


def test_a_pattern_along_one_axis_keeps_the_two_largest():
    params = make_params()
    recipe = make(patterns={"mlp/up": NMPattern(n=2, m=4)})
    mask = mask_of(recipe.init(make_masks(), params, None))
    magnitude = np.abs(up(params)["kernel"]).reshape(L, K // 4, 4, N)
    kept = np.sort(magnitude, axis=2)[:, :, 2:].sum()
    np.testing.assert_allclose(magnitude[np.asarray(mask).reshape(magnitude.shape)].sum(), kept)


def test_phases():
    recipe = make()
    assert [(p.name, p.sparse_weights, p.last_step) for p in recipe.phases] == [
        ("sparse", True, 10),
        ("dense finish", False, None),
    ]
    assert recipe.phases[1].learning_rate == "schedule" and not recipe.phases[1].reset_optimizer
    (only,) = make(dense_fraction=0.0, grad_pruning="mvue").phases
    assert only.grad_pruning == "mvue" and only.last_step is None


def test_decay_reaches_pruned_weights_and_no_others(begun):
    recipe, params, sparsity = begun
    grads = jax.tree.map(jnp.ones_like, params)
    weights = {"model": params, "recipe": {}}
    decayed = recipe.transform_gradients(
        {"model": grads, "recipe": {}}, weights, sparsity, recipe.phases[0]
    )["model"]
    mask, w = mask_of(sparsity), up(params)["kernel"]
    np.testing.assert_array_equal(up(decayed)["kernel"], jnp.where(mask, 1, 1 + RATE * w))
    up(decayed)["kernel"] = up(grads)["kernel"]
    for got, expected in zip(jax.tree.leaves(decayed), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "phase"),
    [({}, 1), ({"variant": "ste", "decay_rate": 0.0}, 0), ({"variant": "sr_ste"}, 0)],
)
def test_gradients_pass_unchanged_elsewhere(changes, phase):
    recipe, params = make(**changes), make_params()
    sparsity = recipe.init(make_masks(), params, None)
    grads = {"model": params, "recipe": {}}
    result = recipe.transform_gradients(grads, grads, sparsity, recipe.phases[phase])
    for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_sr_ste_as_released_decays_gradients_in_the_backward_pass():
    recipe, params = make(variant="sr_ste", sr_ste_decay="gradients"), make_params()
    sparsity = recipe.init(make_masks(), params, None)
    grads = make_params(1)

    def train_through(phase):
        seen, pull_back = jax.vjp(lambda p: recipe.transform_params(p, sparsity, phase), params)
        jax.tree.map(np.testing.assert_array_equal, seen, params)
        return pull_back(grads)[0]

    decayed = train_through(recipe.phases[0])
    mask, w = np.asarray(mask_of(sparsity)), np.asarray(up(params)["kernel"])
    # NM-sparsity's autograd function: grad_output + decay * (1 - mask) * weight.
    expected = up(grads)["kernel"] + np.float32(RATE) * (1 - mask) * w
    np.testing.assert_allclose(up(decayed)["kernel"], expected, rtol=1e-6)
    up(decayed)["kernel"] = up(grads)["kernel"]
    jax.tree.map(np.testing.assert_array_equal, decayed, grads)
    jax.tree.map(np.testing.assert_array_equal, train_through(recipe.phases[1]), grads)
    _, pulled = update(recipe, sparsity, params, 0)
    np.testing.assert_array_equal(up(pulled)["kernel"], w)


def test_sr_ste_may_pull_the_weights_themselves():
    recipe, params = make(variant="sr_ste"), make_params()
    sparsity = recipe.init(make_masks(), params, None)
    _, pulled = update(recipe, sparsity, params, 0)
    w = up(params)["kernel"]
    expected = jnp.where(mask_of(sparsity), w, w - LEARNING_RATE * RATE * w)
    np.testing.assert_allclose(up(pulled)["kernel"], expected, rtol=1e-6)
    _, finished = update(recipe, sparsity, params, 11, recipe.phases[1])
    np.testing.assert_array_equal(up(finished)["kernel"], w)


def test_masks_are_refreshed_every_few_steps(begun):
    recipe, _, sparsity = begun
    other = make_params(1)
    refreshed = []
    for step in range(6):
        after, _ = jax.jit(lambda s, p, step: update(recipe, s, p, step))(sparsity, other, step)
        refreshed.append(bool((mask_of(after) != mask_of(sparsity)).any()))
    assert refreshed == [False, False, True, False, False, True]
    flips = (mask_of(after) != mask_of(sparsity)).mean((1, 2))
    metrics = fetch_metrics(recipe.metrics(after, step=jnp.int32(5), phase=recipe.phases[0]))
    np.testing.assert_allclose(metrics["flip_rate/mlp/up"], flips, rtol=1e-6)
    np.testing.assert_allclose(metrics["flip_rate"], flips.mean(), rtol=1e-6)
    between = recipe.metrics(after, step=jnp.int32(4), phase=recipe.phases[0])
    assert between.keys() == metrics.keys() and not fetch_metrics(between), "nothing was compared"


def test_the_dense_finish_leaves_masks_alone(begun):
    recipe, _, sparsity = begun
    after, _ = update(recipe, sparsity, make_params(1), 2, recipe.phases[1])
    np.testing.assert_array_equal(mask_of(after), mask_of(sparsity))
    assert recipe.metrics(after, step=2, phase=recipe.phases[1]) == {}


def test_a_dense_run_follows_the_masks_it_does_not_use():
    recipe, params = make(variant="dense", decay_rate=0.0), make_params()
    assert not any(phase.sparse_weights for phase in recipe.phases)
    sparsity = recipe.init(make_masks(), params, None)
    after, _ = update(recipe, sparsity, make_params(1), 2)
    np.testing.assert_array_equal(mask_of(after), transposable_mask(up(make_params(1))["kernel"]))
    metrics = recipe.metrics(after, step=jnp.int32(2), phase=recipe.phases[0])
    assert fetch_metrics(metrics)["flip_rate"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "srste"}, "recipe.fst.variant must be one of .* got 'srste'"),
        (
            {"sr_ste_decay": "moments"},
            "recipe.fst.sr_ste_decay must be one of .* got 'moments'",
        ),
        ({"decay_rate": -1.0}, "recipe.fst.decay_rate must be at least 0, got -1.0"),
        ({"variant": "ste"}, "decay_rate must be 0 for variant 'ste', got 0.25"),
        ({"refresh_steps": 0}, "refresh_steps must be at least 1, got 0"),
        ({"grad_pruning": "mvu"}, "grad_pruning must be one of .* got 'mvu'"),
        ({"dense_fraction": 1.0}, r"dense_fraction must be in \[0, 1\), got 1.0"),
        ({"dense_fraction": 0.99}, "dense_fraction must be small enough to leave a sparse step"),
        ({"patterns": {}}, "patterns must be that of at least one weight"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


SOFT = SSTEConfig(patterns={"mlp/up": NMPattern(n=2, m=4)}, flip_interval_steps=2)


def test_s_ste_shows_shrunk_weights_and_freezes_their_scale():
    recipe, params = make_sste(SOFT), make_params()
    sparsity = recipe.init(make_masks(), params, None)
    w = up(params)["kernel"]
    beta = soft_threshold_scale(w, axis=-2)
    other = make_params(1)
    later, _ = update(recipe, sparsity, other, 0)
    seen = recipe.transform_params(other, later, recipe.phases[0])
    expected = beta[:, None, None] * soft_threshold(up(other)["kernel"], axis=-2)
    np.testing.assert_allclose(up(seen)["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(mask_of(later), np.asarray(expected) != 0)
    np.testing.assert_array_equal(up(seen)["bias"], up(other)["bias"])

    def loss(params):
        return up(recipe.transform_params(params, later, recipe.phases[0]))["kernel"].sum()

    grads = up(jax.grad(loss)(other))["kernel"]
    np.testing.assert_array_equal(grads, jnp.ones_like(w)), "straight through, without beta"


def test_s_ste_compares_masks_over_an_interval():
    recipe, params = make_sste(SOFT), make_params()
    sparsity = first = recipe.init(make_masks(), params, None)
    for step, seed in enumerate([1, 2]):
        sparsity, _ = update(recipe, sparsity, make_params(seed), step)
    flips = (mask_of(sparsity) != mask_of(first)).mean()
    metrics = fetch_metrics(recipe.metrics(sparsity, step=jnp.int32(1), phase=None))
    np.testing.assert_allclose(metrics["flip_rate"], flips, rtol=1e-6)
    assert not fetch_metrics(recipe.metrics(sparsity, step=jnp.int32(0), phase=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": TRANSPOSABLE}, "recipe.sste.patterns must be 2:4 and not transposable"),
        ({"flip_interval_steps": 0}, "flip_interval_steps must be at least 1"),
    ],
)
def test_s_ste_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SOFT, **changes)
