"""Every hook of the recipe protocol, seen through the train step on a model of one table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.models import LinearOptions
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import (
    Observation,
    Phase,
    Recipe,
    SpionConfig,
    chain,
    make_spion,
)
from sparsejax.training.state import (
    enter_phase,
    make_abstract_state,
    make_graphdef,
)
from sparsejax.training.step import make_eval_step, make_train_step
from tests.small_models import make_config
from tests.training import toy
from tests.training.toy import (
    BATCH,
    DESCENT,
    GRAPHDEF,
    MAPS,
    PHASE,
    SCALE,
    TABLE,
    VOCAB,
    assert_close,
    count_update,
    init,
    jit,
    loss_and_gradient,
    make_recipe,
    make_state,
    run_step,
    scale_params,
)


def test_the_forward_pass_sees_the_transformed_parameters():
    recipe = make_recipe(transform_params=scale_params)
    state, metrics = run_step(recipe)
    loss, gradient = loss_and_gradient(SCALE * TABLE)
    assert_close(metrics["loss"], loss)
    assert_close(state.params["table"], TABLE - SCALE * gradient)
    assert_close(state.sparsity.params["scale"], SCALE - (gradient * TABLE).sum())
    totals = jit(make_eval_step(GRAPHDEF, recipe, PHASE))(make_state(recipe), BATCH)
    assert_close(totals["loss"] / totals["count"], loss)


@pytest.mark.ci
def test_parameters_are_transformed_once_whatever_the_number_of_parts():
    marked = []

    def scale_and_mark(params, sparsity, phase):
        return {"table": jnp.sinh(scale_params(params, sparsity, phase)["table"])}

    recipe = make_recipe(transform_params=scale_and_mark)
    whole, parts = (
        make_train_step(GRAPHDEF, recipe, PHASE, DESCENT, num_micro_batches=n) for n in (1, 2)
    )
    for got, expected in zip(
        jax.tree.leaves(jit(parts)(make_state(recipe), BATCH)),
        jax.tree.leaves(jit(whole)(make_state(recipe), BATCH)),
        strict=True,
    ):
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            assert_close(got, expected)
    for equation in jax.make_jaxpr(parts)(make_state(recipe), BATCH).eqns:
        marked += [equation.primitive.name] * str(equation).count("sinh ")
    assert marked == ["sinh"], "outside the loop over the parts, and not again"


def test_tokens_are_averaged_over_by_their_weights_whatever_their_part():
    # Examples alternate between the parts: one holds four tokens that count, the other one.
    weights = np.array([[1, 1, 1, 1], [0, 0.5, 0, 0]], np.float32)
    batch, recipe = BATCH | {"loss_weights": weights}, make_recipe()
    loss, gradient = loss_and_gradient(TABLE, weights)
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT, num_micro_batches=2))
    state, metrics = step(make_state(recipe), batch)
    assert_close(metrics["loss"], loss)
    assert_close(state.params["table"], TABLE - gradient)
    evaluate = jit(make_eval_step(GRAPHDEF, recipe, PHASE, num_micro_batches=2))
    totals = evaluate(make_state(recipe), batch)
    assert totals["count"] == 4.5
    assert_close(totals["loss"], 4.5 * loss)


def test_labels_are_smoothed_in_training_alone():
    recipe = make_recipe()
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT, label_smoothing=0.25))
    _, metrics = step(make_state(recipe), BATCH)
    logs = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))
    spread = -logs[BATCH["inputs"]].mean()
    assert_close(metrics["loss"], 0.75 * loss_and_gradient(TABLE)[0] + 0.25 * spread)


def test_the_auxiliary_loss_trains_the_parameters_of_the_recipe():
    def auxiliary_loss(sparsity, attention_maps, phase):
        return (sparsity.params["sum_of_maps"] - attention_maps.sum()) ** 2

    recipe = make_recipe(auxiliary_loss=auxiliary_loss)
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT, probes=True))
    state, metrics, _ = step(make_state(recipe), BATCH)
    loss, gradient = loss_and_gradient(TABLE)
    assert_close(metrics["loss"], loss)  # that of the task alone
    assert_close(state.params["table"], TABLE - gradient)
    assert_close(state.sparsity.params["sum_of_maps"], 2 - 2 * (2 - MAPS.sum()))
    assert_close(state.sparsity.params["scale"], SCALE)


def test_gradients_are_transformed_after_clipping():
    def add_decay(grads, params, sparsity, phase):
        return jax.tree.map(lambda g, w: g + 0.5 * w, grads, params)

    clip = DESCENT._replace(clip=lambda grads: jax.tree.map(lambda g: g.clip(-0.05, 0.05), grads))
    state, metrics = run_step(make_recipe(transform_gradients=add_decay), optimizer=clip)
    _, gradient = loss_and_gradient(TABLE)
    assert np.abs(gradient).max() > 0.05
    assert_close(state.params["table"], TABLE - gradient.clip(-0.05, 0.05) - 0.5 * TABLE)
    assert_close(state.sparsity.params["scale"], 0.5 * SCALE)
    assert_close(metrics["grad_norm"], np.linalg.norm(gradient))


def test_updates_are_transformed_after_the_optimizer():
    def double(updates, sparsity, phase):
        return jax.tree.map(lambda u: 2 * u, updates)

    state, _ = run_step(make_recipe(transform_updates=double))
    _, gradient = loss_and_gradient(TABLE)
    assert_close(state.params["table"], TABLE - 2 * gradient)


def test_gradients_are_masked_before_clipping_and_the_update_sees_all_of_them():
    def mask(grads, sparsity, phase):
        return grads | {"model": {"table": grads["model"]["table"].at[:, :3].set(0)}}

    def keep_gradients(sparsity, params, opt_state, grads, **_):
        statistics = {"updates": grads["model"]["table"]}
        return dataclasses.replace(sparsity, statistics=statistics), params, opt_state

    def clip(grads):
        norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        return jax.tree.map(lambda g: g / norm / 2, grads)

    recipe = make_recipe(mask_gradients=mask, update=keep_gradients)
    state = make_state(recipe)
    sparsity = dataclasses.replace(state.sparsity, statistics={"updates": jnp.zeros_like(TABLE)})
    state = dataclasses.replace(state, sparsity=sparsity)
    state, metrics = run_step(recipe, state, DESCENT._replace(clip=clip))
    _, gradient = loss_and_gradient(TABLE)
    masked = gradient * (np.arange(VOCAB) >= 3)
    assert_close(state.params["table"], TABLE - masked / np.linalg.norm(masked) / 2)
    assert_close(metrics["grad_norm"], np.linalg.norm(masked))
    assert_close(state.sparsity.statistics["updates"], gradient)


def test_a_skipped_optimizer_leaves_weights_and_moments_but_the_update_runs():
    recipe = make_recipe(
        transform_params=scale_params,
        skip_optimizer=lambda step, phase: step % 2 == 0,
        update=count_update,
    )
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT))
    start = make_state(recipe)
    skipped, _ = step(start, BATCH)
    assert (skipped.params["table"] == start.params["table"]).all()
    assert skipped.sparsity.params == start.sparsity.params
    assert skipped.opt_state == start.opt_state
    assert (skipped.step, skipped.sparsity.statistics["updates"]) == (1, 1)
    taken, _ = step(skipped, BATCH)
    assert (taken.params["table"] != start.params["table"]).any()
    assert (taken.opt_state["updates"], taken.sparsity.statistics["updates"]) == (1, 2)


def test_the_update_may_change_masks_weights_and_moments():
    def regrow(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
        noise = jax.random.normal(key, (VOCAB,))
        changed = dataclasses.replace(
            sparsity,
            masks={"kept": sparsity.masks["kept"].at[:, 0].set(False)},
            statistics={"updates": step + 100},
        )
        table = params["table"].at[:, 0].set(noise).at[:, 1].set(grads["model"]["table"][:, 1])
        return changed, {"table": table}, {"updates": opt_state["updates"] + 10}

    recipe = make_recipe(update=regrow)
    before = dataclasses.replace(make_state(recipe, step=4), num_skipped=jnp.int32(3))
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT))
    state, metrics = step(before, BATCH)
    _, gradient = loss_and_gradient(TABLE)
    noise = jax.random.normal(jax.random.fold_in(before.key, 4), (VOCAB,))
    assert_close(state.params["table"][:, 0], noise)
    assert_close(state.params["table"][:, 1], gradient[:, 1])
    assert_close(state.params["table"][:, 2:], (TABLE - gradient)[:, 2:])
    assert not state.sparsity.masks["kept"][:, 0].any() and state.sparsity.masks["kept"][:, 1].all()
    assert (state.opt_state["updates"], state.sparsity.statistics["updates"]) == (11, 104)
    assert (metrics["skipped"], state.num_skipped) == (0, 0)

    broken = dataclasses.replace(before, params={"table": before.params["table"] * jnp.nan})
    after, metrics = step(broken, BATCH)
    assert (metrics["skipped"], after.num_skipped, after.step) == (1, 4, 5)
    assert after.sparsity.masks["kept"].all() and after.opt_state["updates"] == 0
    assert after.sparsity.statistics["updates"] == 0


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        pytest.param({"learning_rate": "schedule"}, 0.8, marks=pytest.mark.ci),
        pytest.param({"learning_rate": "restart"}, 0.3, marks=pytest.mark.ci),
        pytest.param({"learning_rate": "constant"}, 1.0, marks=pytest.mark.ci),
        ({"learning_rate": "restart", "learning_rate_scale": 0.5}, 0.15),
    ],
    ids=str,
)
def test_the_learning_rate_of_a_phase(settings, rate):
    recipe = make_recipe(Phase("first"), Phase("second", **settings))
    state = enter_phase(make_state(recipe, step=5), recipe, recipe.phases[1], DESCENT)
    state = dataclasses.replace(state, step=jnp.int32(7))
    state, metrics = run_step(recipe, state, phase=recipe.phases[1])
    assert_close(metrics["learning_rate"], rate)
    assert_close(state.params["table"], TABLE - rate * loss_and_gradient(TABLE)[1])


@pytest.mark.parametrize("reset", [False, True])
def test_entering_a_phase(reset):
    def forget(sparsity, phase, *, previous):
        assert (previous.name, phase.name) == (PHASE.name, "second")
        return dataclasses.replace(sparsity, statistics={})

    second = Phase("second", reset_optimizer=reset)
    recipe = make_recipe(PHASE, second, enter_phase=forget)
    before = dataclasses.replace(make_state(recipe, step=9), opt_state={"updates": jnp.int32(9)})
    state = enter_phase(before, recipe, second, DESCENT)
    assert state.sparsity.phase_start_step == 9 and state.sparsity.statistics == {}
    assert state.opt_state["updates"] == (0 if reset else 9)
    assert state.params is before.params and state.step == 9


def test_a_part_that_goes_on_keeps_its_learning_rate_and_its_moments():
    fresh = {"learning_rate": "restart", "reset_optimizer": True}
    attention = Recipe("a", (Phase("one", last_step=4), Phase("two", **fresh)))
    recipe = chain(attention, Recipe("w", (Phase("x", last_step=8), Phase("y"))))
    first, second, third = recipe.phases

    def enter(phase, previous, step):
        before = make_state(recipe, step=step)
        sparsity = dataclasses.replace(before.sparsity, phase_start_step=jnp.int32(4))
        before = dataclasses.replace(
            before, sparsity=sparsity, opt_state={"updates": jnp.int32(step)}
        )
        after = enter_phase(before, recipe, phase, DESCENT, previous=previous)
        return int(after.sparsity.phase_start_step), int(after.opt_state["updates"])

    assert enter(second, first, 5) == (5, 0)
    assert enter(third, second, 8) == (4, 8)


def test_a_step_that_probes_shows_its_maps_and_is_a_step_otherwise():
    def observe(sparsity, attention_maps, phase):
        updates = sparsity.statistics["updates"] + attention_maps.sum().astype(jnp.int32)
        sparsity = dataclasses.replace(sparsity, statistics={"updates": updates})
        return sparsity, Observation(change_phase=updates > 10, metrics={"updates": updates})

    recipe = make_recipe(observe=observe)
    probe = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT, probes=True))
    before = make_state(recipe)
    state, metrics, observation = probe(before, BATCH)
    assert not observation.change_phase and observation.metrics["updates"] == (8, True)
    expected, expected_metrics = run_step(recipe)
    assert (state.params["table"] == expected.params["table"]).all() and state.step == 1
    assert metrics["loss"] == expected_metrics["loss"]
    assert probe(state, BATCH)[2].change_phase
    broken = dataclasses.replace(state, params={"table": state.params["table"] * jnp.nan})
    after, _, observation = probe(broken, BATCH)
    assert not observation.change_phase, "a skipped step asks for nothing"
    assert observation.metrics["updates"] == (0, False), "and found nothing"
    assert after.sparsity.statistics["updates"] == state.sparsity.statistics["updates"]


@pytest.mark.ci
def test_new_masks_and_statistics_do_not_compile_again():
    traces = []

    def count_traces(params, sparsity, phase):
        traces.append(phase)
        return params

    recipe = make_recipe(transform_params=count_traces, update=count_update)
    step = jit(make_train_step(GRAPHDEF, recipe, PHASE, DESCENT))
    state = make_state(recipe)
    losses = set()
    for pruned in range(4):
        masks = {"kept": jnp.ones((VOCAB, VOCAB), bool).at[:, :pruned].set(False)}
        sparsity = dataclasses.replace(state.sparsity, masks=masks)
        state, metrics = step(dataclasses.replace(state, sparsity=sparsity), BATCH)
        losses.add(float(metrics["loss"]))
    assert len(losses) == 4 and len(traces) == 1
    assert state.sparsity.statistics["updates"] == 4


@pytest.mark.ci
def test_a_step_keeps_the_structure_of_its_phase():
    config = make_config(max_length=32, block=BlockPattern(block_q=16, block_kv=16))
    spion = SpionConfig(
        block_size=16,
        probe_interval_fraction=0.5,
        quantile=0.5,
        num_layers=2,
        num_heads=2,
        length=32,
        num_steps=10,
        causal=True,
    )
    recipe = make_spion(spion)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "loss_weights": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    graphdef = make_graphdef(config)
    for phase in recipe.phases:
        state = make_abstract_state(config, recipe, DESCENT, phase.name)
        after, _ = jax.eval_shape(make_train_step(graphdef, recipe, phase, DESCENT), state, batch)
        assert after == state
        if phase.probe_every_steps:
            step = make_train_step(graphdef, recipe, phase, DESCENT, probes=True)
            assert jax.eval_shape(step, state, batch)[0] == state
            assert state.sparsity.statistics["map_before"].shape == (2, 32, 32)
    assert set(state.sparsity.statistics) == {"pooled"}

    with pytest.raises(ValueError, match=r"one of \['dense', 'sparse'\] in recipe 'spion-cf'"):
        make_abstract_state(config, recipe, DESCENT, "finish")


def test_masks_are_made_of_the_parameters():
    def init_from_weights(masks, params, key):
        del key
        masks = {"kept": masks["kept"] & (params["table"] > 0)}
        return init(masks, params, None)

    state = make_state(Recipe(name="toy", phases=(PHASE,), init=init_from_weights))
    np.testing.assert_array_equal(state.sparsity.masks["kept"], TABLE > 0)


def test_update_learns_the_rate_and_metrics_tell_of_their_step():
    def pull(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
        return sparsity, {"table": params["table"] * 0 + learning_rate}, opt_state

    recipe = make_recipe(
        Phase("only"),
        update=pull,
        metrics=lambda sparsity, *, step, phase: {"found": step * jnp.arange(2.0)},
    )
    before = make_state(recipe, step=4)
    state, metrics = run_step(recipe, before)
    np.testing.assert_allclose(state.params["table"], metrics["learning_rate"])
    np.testing.assert_allclose(metrics["found"].value, [0, 4])
    assert metrics["found"].known
    broken = dataclasses.replace(before, params={"table": before.params["table"] * jnp.nan})
    assert not run_step(recipe, broken)[1]["found"].known, "skipped: nothing was found"


@pytest.mark.parametrize("grad_pruning", ["none", "mvue"])
def test_linear_layers_learn_the_phase(grad_pruning):
    phase = Phase("only", sparse_weights=True, grad_pruning=grad_pruning)
    recipe = make_recipe(phase)
    seen = []
    graphdef = toy.make_graphdef(lambda *noted: seen.append(noted))
    step = make_train_step(graphdef, recipe, phase, DESCENT)
    evaluate = make_eval_step(graphdef, recipe, phase, weight_implementation="xla")
    for function in (step, evaluate):
        jax.eval_shape(function, make_state(recipe), BATCH)
    training, evaluation = seen[0], seen[-1]
    assert training == (LinearOptions(grad_pruning=grad_pruning), grad_pruning != "none")
    # Nothing is drawn where nothing is differentiated.
    assert evaluation == (LinearOptions(implementation="xla"), False)
