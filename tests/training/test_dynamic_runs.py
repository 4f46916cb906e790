"""Dynamic sparse training through the train step, the loop and the ledger of its FLOPs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import mst_gpt2, mst_small
from sparsejax.accounting.density import (
    Density,
    PhaseFlops,
    compute_density,
    count_phase_flops,
    make_dense,
)
from sparsejax.accounting.ledger import FlopsLedger, summarise_flops
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.models import LinearOptions, sparse_weight_patterns
from sparsejax.optimizer import make_optimizer
from sparsejax.patterns import Unstructured
from sparsejax.recipes import (
    Phase,
    Recipe,
    RigLConfig,
    StaticWeightsConfig,
    StepAccount,
    get_weight_masks,
    make_rigl,
    make_static_weights,
)
from sparsejax.recipes.weight_masks import map_sparse_weights
from sparsejax.report.metrics import read_metrics
from sparsejax.training.setup import prepare_run
from sparsejax.training.state import make_abstract_state, make_graphdef
from sparsejax.training.step import make_train_step
from tests.small_models import (
    assert_same,
    make_batch,
    make_config,
    make_small_optimizer,
    make_state,
    make_step,
)
from tests.training.runs import (
    NUM_STEPS,
    assert_documented,
    copy_until,
    load_end,
    make_settings,
    train,
)

_MODEL = make_config(sparse_weights=(("attention/out|mlp/up", Unstructured()),))
_KNOWN = {"num_steps": 100, "patterns": sparse_weight_patterns(_MODEL)}
_optimizer = functools.partial(make_small_optimizer, clip_norm=0.1)


def _kernels(params, masks):
    found = {}
    map_sparse_weights(lambda name, _, w: found.setdefault(name, np.asarray(w)), masks, params)
    return found


@pytest.mark.slow
def test_static_masks_are_dense_training_of_masked_weights():
    # Adam would make much of the rounding of gradients that are zero.
    optimizer = _optimizer(name="sgd", learning_rate=1.0)
    recipe = make_static_weights(StaticWeightsConfig(**_KNOWN))
    state = make_state(_MODEL, recipe, optimizer)
    assert set(get_weight_masks(state.sparsity.masks)) == set(_KNOWN["patterns"])

    def mask_weights(params, sparsity, phase):
        del phase
        return map_sparse_weights(lambda _, mask, w: w * mask, sparsity.masks, params)

    plain = Recipe("plain", (Phase("dense"),), transform_params=mask_weights)
    expected = dataclasses.replace(state, params=mask_weights(state.params, state.sparsity, None))
    step, plain_step = (make_step(_MODEL, r, optimizer) for r in (recipe, plain))
    for seed in range(3):
        state, metrics = step(state, make_batch(seed))
        expected, plain_metrics = plain_step(expected, make_batch(seed))
        np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], plain_metrics["grad_norm"], rtol=1e-4)
        assert metrics["grad_norm"] > 1.5 * 0.1, "clipping is on"
    assert_same(state.params, expected.params, atol=1e-6)
    for name, mask in get_weight_masks(state.sparsity.masks).items():
        kernel = _kernels(state.params, state.sparsity.masks)[name]
        assert not kernel[~np.asarray(mask)].any() and kernel[np.asarray(mask)].all()


def _dense_gradient(state, batch):
    """Return the gradient of every weight at the masked ones, without the train step."""

    def loss(params):
        model = nnx.merge(make_graphdef(_MODEL), params, state.sparsity.masks)
        logits = model(batch["inputs"], linear_options=LinearOptions()).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean()

    return _kernels(jax.jit(jax.grad(loss))(state.params), state.sparsity.masks)


@pytest.mark.ci
@pytest.mark.parametrize(
    "keep", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["skipped", "kept"]
)
def test_an_update_grows_where_the_gradient_of_the_whole_batch_is_largest(keep):
    # A clipped gradient would be all ties: it must not decide.
    optimizer = _optimizer(clip_value=1e-6)
    recipe = make_rigl(
        RigLConfig(**_KNOWN, update_interval_fraction=0.02, keep_optimizer_step=keep)
    )
    state, step = (
        make_state(_MODEL, recipe, optimizer),
        make_step(_MODEL, recipe, optimizer, num_micro_batches=2),
    )
    for seed in range(2):
        state, metrics = step(state, make_batch(seed))
        assert not metrics["mask_density"].known
    gradient = _dense_gradient(state, make_batch(9))
    after, metrics = step(state, make_batch(9))
    assert metrics["dense_gradient"].value == 1 and metrics["skipped"] == 0
    old, new = (get_weight_masks(s.sparsity.masks) for s in (state, after))
    before, weights = (_kernels(s.params, s.sparsity.masks) for s in (state, after))
    for name in old:
        for layer in range(_MODEL.num_layers):
            was, now = np.asarray(old[name][layer]), np.asarray(new[name][layer])
            size = np.abs(gradient[name][layer])
            grown = now & ~was
            assert grown.any() and now.sum() == was.sum()
            assert size[grown].min() >= size[~now].max() * 0.999
            assert not weights[name][layer][~now].any()
            assert not weights[name][layer][grown].any()
        stayed = np.asarray(old[name] & new[name])
        moved = (weights[name][stayed] != before[name][stayed]).mean()
        assert moved > 0.9 if keep else moved == 0
    if not keep:
        biases = (s.params["blocks"]["mlp"]["up"]["bias"] for s in (state, after))
        np.testing.assert_array_equal(*biases)
    counts = [int(s.opt_state[0].count) for s in (state, after)]
    assert counts == ([2, 3] if keep else [2, 2])
    state, _ = step(after, make_batch(3))
    assert step._cache_size() == 1, "an update compiled a new program"
    assert int(state.opt_state[0].count) == counts[1] + 1


@pytest.mark.ci
def test_moments_of_grown_weights_begin_at_zero_or_where_they_were():
    nonzero = {}
    for rule in ("zero", "stale"):
        # Whatever decays: moments of weights that were never kept are zero under both rules.
        recipe = make_rigl(RigLConfig(**_KNOWN, update_interval_fraction=0.02, moments=rule))
        optimizer = _optimizer()
        state, step = make_state(_MODEL, recipe, optimizer), make_step(_MODEL, recipe, optimizer)
        ones = jax.tree.map(jnp.ones_like, state.opt_state[0].nu)
        adam = state.opt_state[0]._replace(nu=ones)
        state = dataclasses.replace(state, opt_state=(adam, *state.opt_state[1:]))
        for seed in range(3):
            last, (state, _) = state, step(state, make_batch(seed))
        old, new = (get_weight_masks(s.sparsity.masks) for s in (last, state))
        moments = _kernels(state.opt_state[0].nu["model"], state.sparsity.masks)
        grown = np.asarray(new["mlp/up"] & ~old["mlp/up"])
        nonzero[rule] = (moments["mlp/up"][grown] != 0).mean()
        assert grown.any() and (moments["mlp/up"][~grown] != 0).all()
    assert nonzero == {"zero": 0, "stale": 1}


def test_flops_follow_the_masks():
    phase = make_static_weights(StaticWeightsConfig(**_KNOWN)).phases[0]
    model = dataclasses.replace(_MODEL, sparse_weights=((".*/.*", Unstructured()),))
    weights = {name: np.full(2, 0.5, np.float32) for name in sparse_weight_patterns(model)}
    density = Density(np.ones(2, np.float32), weights)
    ledger = FlopsLedger(model, batch_size=3)
    ledger.begin_phase(phase, density)
    tokens = 3 * 16
    linears = 2 * tokens * 2 * 16 * (3 * 16 + 16 + 2 * 32)  # two layers, one pass
    rest = ledger.dense_step_flops - 3 * linears
    assert rest == 3 * (2 * tokens * 16 * 17 + 2 * 2 * 2 * 3 * (16 * 17 // 2) * 16)
    assert ledger.record_step(StepAccount())["step_flops"] == rest + 3 * linears / 2
    # A gradient of all weights costs half a pass more; new masks count from the next step on.
    fewer = dict.fromkeys(weights, [0.25, 0.25])
    row = ledger.record_step(StepAccount(dense_gradient=True, weight_density=fewer))
    assert row == {
        "attention_density": 1.0,
        "weight_density": 0.5,
        "step_flops": rest + linears * (0.5 + 0.5 + 1),
    }
    row = ledger.record_step(StepAccount())
    assert row["step_flops"] == rest + 3 * linears / 4 and row["weight_density"] == 0.25
    # All that was entered: by pass and part of the model, and what dense training takes.
    entry = ledger.totals[phase.name]
    layer = linears / 2
    attention = 2 * 2 * 3 * (16 * 17 // 2) * 16
    kept = 0.5 + 0.5 + 0.25
    assert entry["steps"] == 3 and entry["update"] == {
        "layer 0": layer / 2,
        "layer 1": layer / 2,
    } | {"head": 0}
    for name, passes in {"forward": 1, "backward": 2}.items():
        expected = passes * (3 * attention + kept * layer)
        assert entry[name]["layer 0"] == entry[name]["layer 1"] == expected
        assert entry[name]["head"] == 3 * passes * 2 * tokens * 16 * 17
    assert sum(entry["dense_equivalent"].values()) == 3 * ledger.dense_step_flops
    assert summarise_flops(ledger.totals)["training_flops"] == 3 * rest + linears * (3 * kept + 0.5)
    straight_through = phase._replace(masked_gradients=False)
    flops = 3 * count_phase_flops(model, straight_through, density)
    assert flops == rest + linears * (0.5 + 0.5 + 1)


_MST = {
    "recipe__name": "mst",
    "recipe__mst__sparsity": 0.8,
    "recipe__mst__sparse_weights": "mlp/.*=unstructured",
    "recipe__mst__update_interval_fraction": 0.2,
    "recipe__mst__stairs": 2,
    "recipe__mst__warmup": 0.3,
    "recipe__mst__restoration": 0.3,
    "recipe__mst__attention_stride": 32,
    "checkpoint__keep_last": NUM_STEPS,
}


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    settings = make_settings(tmp_path_factory.mktemp("corpus"), **_MST)
    workdir = tmp_path_factory.mktemp("mst")
    with jax.debug_nans(True):
        return settings, workdir, train(settings, workdir)


def _load(settings, workdir, step):
    info = next(i for i in find_checkpoints(workdir / "checkpoints") if i.step == step)
    run = prepare_run(parse_config(settings))
    phase = next(p for p in run.recipe.phases if p.name == info.metadata["phase"])
    state, data_state = restore(info, run.make_abstract_state(phase.name))
    return run, phase, dataclasses.replace(state, key=jax.random.key_data(state.key)), data_state


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [4, pytest.param(6, marks=pytest.mark.slow)],
    ids=["ultra_sparse", "before_an_update_and_a_switch"],
)
def test_resuming_is_bit_exact_across_updates(step, trained, tmp_path):
    settings, workdir, _ = trained
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    (state, data), (expected, expected_data) = (load_end(settings, x) for x in (resumed, workdir))
    assert data == expected_data
    assert_same(state, expected)

    def rows(folder):
        rows = read_metrics(folder / "metrics.jsonl")
        return [
            {name: value for name, value in row.items() if not name.endswith(("seconds", "second"))}
            for row in rows
            if row["kind"] in ("train", "phase")
        ]

    def only_training(rows):
        return [row for row in rows if row["kind"] == "train"]

    assert only_training(rows(resumed)) == only_training(rows(workdir))
    books = [(folder / "flops.json").read_text() for folder in (resumed, workdir)]
    assert books[0] == books[1]


@pytest.mark.ci
def test_a_run_shows_phases_densities_and_flops(trained):
    settings, workdir, summary = trained
    assert_documented(workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    steps = {row["step"]: row for row in rows if row["kind"] == "train"}
    names = ["warm-up"] * 3 + ["ultra-sparse"] * 4 + ["restoration"] * 3
    assert [steps[step]["phase"] for step in range(1, 11)] == names
    # Step 3 of 10 is the update at 2 steps done.
    assert [step for step in steps if "mask_density" in steps[step]] == [3, 5, 7, 9]
    targets = [steps[step]["target_density"] for step in (3, 5, 7, 9)]
    np.testing.assert_allclose(targets, [0.6, 0.2, 0.2, 1.0], atol=1e-6)
    found = [steps[step]["mask_density"] for step in (3, 5, 7, 9)]
    np.testing.assert_allclose(found, targets, atol=1e-3)
    assert steps[4]["attention_density"] < 1 and steps[10]["attention_density"] == 1
    assert "optimizer" not in summary and np.isfinite(summary["validation_loss"])

    # The ledger against what each checkpoint holds.
    spent = 0
    for step in range(1, NUM_STEPS):
        run, phase, state, _ = _load(settings, workdir, step)
        density = compute_density(run.model_config, state.sparsity.masks, phase)
        dense_gradient = step + 1 in (3, 5, 7, 9)
        flops = 4 * count_phase_flops(
            run.model_config, phase, density, dense_gradient=dense_gradient
        )
        dense_flops = 4 * count_phase_flops(run.model_config, phase, make_dense(density))
        assert steps[step + 1]["step_flops"] == flops, step
        spent += flops
    assert steps[1]["step_flops"] == dense_flops
    spent += dense_flops
    assert summary["training_flops"] == pytest.approx(spent)
    assert summary["training_flops_of_dense"] == pytest.approx(spent / dense_flops / NUM_STEPS)
    parts = [summary[f"{name}_training_flops"] for name in dict.fromkeys(names)]
    assert sum(parts) == pytest.approx(spent)
    book = json.loads((workdir / "flops.json").read_text())
    assert {name: entry["steps"] for name, entry in book.items()} == {
        name: names.count(name) for name in names
    }
    passes = [sum(x[name].values()) for x in book.values() for name in PhaseFlops._fields]
    assert sum(passes) == pytest.approx(spent)
    assert sum(book["ultra-sparse"]["update"].values()) > 0
    shares = [summary[f"{name}_training_flops_of_dense"] for name in dict.fromkeys(names)]
    # Warm-up ends with its first update, whose step is still dense.
    assert shares[0] == 1 and shares[1] < shares[2] < 1
    json.dumps(summary)


@pytest.mark.ci
@pytest.mark.parametrize("config", [mst_small, mst_gpt2])
def test_the_configs_that_ship_can_be_traced(config):
    settings = config.get_config().to_dict()
    parsed = parse_config(settings)
    model = make_transformer_config(parsed, task="language_model", vocab_size=256, num_classes=0)
    recipe = make_recipe(parsed, model)
    optimizer = make_optimizer(parsed.optimizer, num_steps=parsed.num_steps)
    length = parsed.data.sequence_length
    batch = {
        "inputs": jax.ShapeDtypeStruct((12, length), jnp.int32),
        "targets": jax.ShapeDtypeStruct((12, length), jnp.int32),
        "loss_weights": jax.ShapeDtypeStruct((12,), jnp.float32),
    }
    for phase in recipe.phases:
        state = make_abstract_state(model, recipe, optimizer, phase.name)
        step = make_train_step(make_graphdef(model), recipe, phase, optimizer)
        assert jax.eval_shape(step, state, batch)[0] == state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe__mst__sparse_weights": "mlp/.*=2:4"},
            "'unstructured' or blocks .* where the sparsity changes",
        ),
        (
            {"recipe__mst__sparse_weights": ".*=half"},
            "like '2:4', .* or 'unstructured', got 'half'",
        ),
        ({"recipe__mst__sparse_weights": ""}, "'regex=pattern' of at least one weight"),
        (
            {"recipe__mst__attention_stride": 24, "recipe__mst__attention_blocks": True},
            "multiple of the attention block, 16 positions",
        ),
        ({"recipe__mst__sparsity": 1.0}, r"recipe.mst: sparsity must be in \[0, 1\)"),
        ({"recipe__mst__growth": "best"}, "recipe.mst.growth must be one of .* got 'best'"),
        ({"recipe__mst__warmup": 0.8}, "leave an ultra-sparse phase between"),
        ({"recipe__name": "fst", "recipe__fst__sparse_weights": "mlp/up=unstructured"}, "n:m for"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, tmp_path):
    settings = make_settings(tmp_path, **_MST | changes)
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_a_kernel_for_2_of_4_is_refused(tmp_path):
    settings = make_settings(tmp_path, **_MST, model__weight_implementation="mosaic_sm90")
    with pytest.raises(ConfigError, match="weight_implementation='mosaic_sm90' must run on this"):
        prepare_run(parse_config(settings))
