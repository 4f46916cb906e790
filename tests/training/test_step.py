"""The jitted step: what it computes, when it refuses, and that it stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.recipes import Observation, make_dense
from sparsejax.training.state import make_graphdef
from sparsejax.training.step import make_eval_step, make_train_step
from tests.small_models import (
    SPARSE_ATTENTION,
    initialise_state,
    make_batch,
    make_config,
    make_small_optimizer,
    make_step,
    prune_attention,
)

_CHANGES = {"max_length": 32, "num_kv_heads": 1}
# Two of its steps are golden ones, compiled in tests/golden as well.
_MODEL = make_config(**_CHANGES, dropout_rate=0.1)
_STILL = make_config(**_CHANGES)
_OPTIMIZER = make_small_optimizer(schedule="cosine", warmup_fraction=0.02)
_batch = functools.partial(make_batch, length=32)


def _make(recipe=None, model=_MODEL, **options):
    arguments = model, recipe or make_dense(), _OPTIMIZER
    return initialise_state(*arguments), make_step(*arguments, implementation="xla", **options)


def _run(state, step, num_steps, batch=None):
    history = []
    for i in range(num_steps):
        state, metrics = step(state, _batch(i) if batch is None else batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.ci
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(None, marks=pytest.mark.slow), SPARSE_ATTENTION],
    ids=["dense", "sparse"],
)
def test_overfits_one_batch(recipe):
    state, step = _make(recipe, _STILL)
    _, history = _run(prune_attention(state) if recipe else state, step, 80, _batch())
    assert history[0]["loss"] > 2.5
    assert history[-1]["loss"] < 0.5
    assert history[-1]["accuracy"] > 0.9


@pytest.mark.ci
def test_same_state_and_batch_give_the_same_bits():
    state, step = _make()
    first, second = (_run(state, step, 2)[0] for _ in range(2))
    for one, other in zip(
        jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True
    ):
        assert np.array_equal(one, other)


@pytest.mark.ci
def test_micro_batches_average_to_the_whole_batch():
    state, whole = _make(model=_STILL)
    _, split = _make(model=_STILL, num_micro_batches=2)
    (one, metrics), (other, other_metrics) = whole(state, _batch()), split(state, _batch())
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5)
    # The first warm-up step has rate 0; moments tell the gradients apart.
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.ci
def test_evaluation_and_probe_by_parts_see_the_whole_batch():
    state, _ = _make(model=_STILL)
    graphdef, recipe = make_graphdef(_STILL), make_dense()
    seen = recipe._replace(
        observe=lambda sparsity, maps, phase: (
            sparsity,
            Observation(change_phase=jnp.bool_(False), metrics={"maps": maps}),
        )
    )

    def look(num_micro_batches):
        options = {"num_micro_batches": num_micro_batches}
        evaluate = make_eval_step(graphdef, seen, seen.phases[0], **options)
        step = make_train_step(graphdef, seen, seen.phases[0], _OPTIMIZER, probes=True, **options)
        return evaluate(state, _batch()), step(state, _batch())[2].metrics

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), look(2), look(1))


def test_non_finite_step_changes_nothing_but_the_counter():
    state, step = _make()
    state, _ = _run(state, step, 2)
    broken = jax.tree.map(lambda x: x, state.params)
    broken["final_norm"]["scale"] = broken["final_norm"]["scale"].at[0].set(jnp.nan)
    before = dataclasses.replace(state, params=broken)
    after, metrics = step(before, _batch())
    assert metrics["skipped"] == 1.0
    assert after.step == before.step + 1
    untouched = [(s.params, s.opt_state, s.sparsity) for s in (before, after)]
    jax.tree.map(functools.partial(np.testing.assert_array_equal), *untouched)
    _, metrics = step(state, _batch())
    assert metrics["skipped"] == 0.0


def test_new_masks_do_not_recompile():
    state, step = _make(SPARSE_ATTENTION)
    dense_loss = step(state, _batch())[1]["loss"]
    sparse_loss = step(prune_attention(state), _batch())[1]["loss"]
    assert dense_loss != sparse_loss
    assert step._cache_size() == 1


@pytest.mark.ci
def test_evaluation_ignores_examples_of_weight_zero():
    state, _ = _make()
    evaluate = jax.jit(make_eval_step(make_graphdef(_MODEL), make_dense(), make_dense().phases[0]))
    batch = _batch()
    half = batch | {"loss_weights": jnp.array([1.0, 1.0, 0.0, 0.0])}
    first_two = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:2]]), batch)
    sums, expected = evaluate(state, half), evaluate(state, first_two)
    assert sums["count"] == 2 * 32
    np.testing.assert_allclose(2 * sums["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.ci
def test_a_step_averages_over_the_tokens_that_count():
    (state, step), (_, whole) = _make(None, _STILL, num_micro_batches=2), _make(None, _STILL)
    batch = _batch()
    # The two micro-batches hold 40 and 2 tokens of weight 1.
    weights = np.zeros((4, 32), np.float32)
    weights[0], weights[2, :8], weights[1, 5], weights[3, 7] = 1, 1, 1, 1
    batch["loss_weights"] = jnp.asarray(weights)
    (got, metrics), (expected, whole_metrics) = step(state, batch), whole(state, batch)
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(compare, got.opt_state, expected.opt_state)
    elsewhere = batch | {"targets": jnp.where(weights > 0, batch["targets"], 0)}
    assert whole(state, elsewhere)[1]["loss"] == whole_metrics["loss"]
