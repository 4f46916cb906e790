"""Masked language modelling and images in patches, from settings to a trained model."""

import functools

import jax
import numpy as np
import pytest

from configs import fst_bert, fst_deit
from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.data import describe_data, make_data
from sparsejax.optimizer import make_optimizer
from sparsejax.recipes import get_weight_masks
from sparsejax.report.metrics import read_metrics
from sparsejax.tools.programs import make_abstract_batch
from sparsejax.training.setup import prepare_run
from sparsejax.training.state import create_train_state, make_abstract_state, make_graphdef
from sparsejax.training.step import make_eval_step, make_train_step
from tests.data.test_files import write_idx
from tests.training.runs import make_settings, train

_FST = {
    "recipe__name": "fst",
    "recipe__fst__refresh_steps": 2,
    "recipe__fst__grad_pruning": "mvue",
    "recipe__fst__decay_rate": 1e-3,
    "model__dropout_rate": 0.0,
}
_MASKED = _FST | {
    "data__mask_fraction": 0.15,
    "model__mlp_activation": "geglu",
    "model__use_bias": False,
    "model__embedding_norm": True,
    "optimizer__schedule": "triangle",
}


def _make_patch_settings(folder, **changes):
    """Return settings for grey images of 8 x 12, classed by the row that patches have bright."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("t10k", 12)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 8, 12))
        for image, label in zip(images, labels, strict=True):
            image[label::4] += 120
        write_idx(folder / f"{split}-images", images)
        write_idx(folder / f"{split}-labels", labels)
    patches = {
        "data__source": f"idx:{folder}",
        "data__validation_fraction": 0.05,
        "data__patch_size": 4,
        "data__sequence_length": 8,
        "model__block_size": 8,
    }
    return make_settings(folder, **_FST | patches | changes)


def _make_letter_settings(folder, **changes):
    """Return settings for a text whose windows hold one letter of eight each."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("i"), 400, np.uint8)
    (folder / "letters.txt").write_bytes(letters.repeat(64).tobytes())
    source = {"data__source": f"text:{folder / 'letters.txt'}"}
    return make_settings(folder, **_MASKED | source | changes)


_MAKERS = {"masked": _make_letter_settings, "patches": _make_patch_settings}


def _trace(config, spec):
    """Trace the steps of every phase with shapes alone; nothing is computed."""
    model = make_transformer_config(config, **spec._asdict())
    recipe, graphdef = make_recipe(config, model), make_graphdef(model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
    batch = make_abstract_batch(config, spec)
    for phase in recipe.phases:
        state = make_abstract_state(model, recipe, optimizer, phase.name)
        step = make_train_step(
            graphdef, recipe, phase, optimizer, num_micro_batches=config.num_micro_batches
        )
        after, metrics = jax.eval_shape(step, state, batch)
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, after)]
        assert shapes[0] == shapes[1]
        assert metrics["loss"].shape == ()
    return model


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["masked", "patches"])
def test_what_is_planned_is_what_is_trained(kind, tmp_path):
    config = parse_config(_MAKERS[kind](tmp_path))
    data = make_data(config.data)
    spec = describe_data(config.data)
    assert spec == data.spec
    for batch in (next(data.train), next(data.validation(1))):
        abstract = make_abstract_batch(config, spec)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in abstract.items()
        }
    _trace(config, spec)


@pytest.mark.slow
def test_the_published_settings_make_steps_of_the_published_shapes():
    bert = parse_config(fst_bert.get_config().to_dict())
    model = _trace(bert, describe_data(bert.data))
    assert (model.causal, model.num_classes, model.vocab_size) == (False, 0, 32_896)
    assert bert.num_steps * bert.num_micro_batches == 300_000
    recipe = make_recipe(bert, model)
    assert recipe.phases[0].last_step == pytest.approx(250_000 / 32, abs=1)
    rate = make_optimizer(bert.optimizer, num_steps=bert.num_steps).schedule
    for share, expected in ((0, 0.25), (0.5, 0.75), (0.75, 1.0), (0.9, 0.4), (1, 0.0)):
        assert rate(share * bert.num_steps) == pytest.approx(expected * 1e-3, abs=1e-6)

    deit = parse_config(fst_deit.get_config().to_dict())
    model = _trace(deit, describe_data(deit.data))
    assert (model.max_length, model.patch_values) == ((224 // 16) ** 2, 16 * 16 * 3)
    assert make_recipe(deit, model).phases[0].last_step == 250 * 625
    rate = make_optimizer(deit.optimizer, num_steps=deit.num_steps).schedule
    assert rate(5 * 625) == pytest.approx(2e-4)
    assert rate(300 * 625) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.ci
def test_loss_and_accuracy_are_those_of_chosen_tokens(tmp_path):
    config = parse_config(make_settings(tmp_path, **_MASKED | {"recipe__name": "dense"}))
    data = make_data(config.data)
    model_config = make_transformer_config(config, **describe_data(config.data)._asdict())
    recipe, graphdef = make_recipe(config, model_config), make_graphdef(model_config)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
    create = functools.partial(create_train_state, model_config, recipe, optimizer)
    state = jax.jit(create)(jax.random.key(0))
    (phase,) = recipe.phases
    step = jax.jit(make_train_step(graphdef, recipe, phase, optimizer, num_micro_batches=2))
    evaluate = jax.jit(make_eval_step(graphdef, recipe, phase))
    batch = next(data.train)
    totals = evaluate(state, batch)
    assert totals["count"] == 4 * 10  # 15 % of 64 tokens, in each of four examples

    # Taken from single examples, one chosen token at a time.
    losses = []
    for row in range(4):
        for position in np.flatnonzero(batch["loss_weights"][row]):
            one = np.zeros_like(batch["loss_weights"])
            one[row, position] = 1
            losses.append(float(evaluate(state, batch | {"loss_weights": one})["loss"]))
    np.testing.assert_allclose(np.sum(losses), totals["loss"], rtol=1e-5)
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)

    elsewhere = np.where(batch["loss_weights"] > 0, batch["targets"], 7).astype(np.int32)
    same, same_metrics = step(state, batch | {"targets": elsewhere})
    assert same_metrics["loss"] == metrics["loss"]
    jax.tree.map(np.testing.assert_array_equal, same.opt_state, after.opt_state)
    there = np.where(batch["loss_weights"] > 0, 7, batch["targets"]).astype(np.int32)
    assert step(state, batch | {"targets": there})[1]["loss"] != metrics["loss"]


_SIZES = (
    *("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("vocab_size", "num_classes", "patch_values"),
)
_LONGER = {
    "num_steps": 40,
    "checkpoint__every_steps": 40,
    "eval_every_steps": 40,
    "optimizer__learning_rate": 1e-2,
    "num_eval_batches": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("masked", {"optimizer__warmup_fraction": 0.5, "num_micro_batches": 2}),
        ("patches", {"data__random_crop": False}),
    ],
)
def test_a_run_learns_with_sparse_weights(kind, changes, tmp_path):
    settings = _MAKERS[kind](tmp_path, **_LONGER | changes)
    summary = train(settings, tmp_path / "run")
    # What is hidden stands around it; what is bright in patches is their class.
    assert summary["validation_accuracy"] > 0.95
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    phases = [row["phase"] for row in rows if row["kind"] == "phase"]
    assert phases == ["sparse", "dense finish"]
    assert any(row.get("flip_rate", 0) > 0 for row in rows)
    run = prepare_run(parse_config(settings))
    model = run.model_config
    flops = count_transformer_flops(model)
    begins = [row for row in rows if row["kind"] == "phase"]
    assert [row["dense_step_flops"] for row in begins] == [4 * flops.training] * 2
    assert begins[0]["step_flops"] < begins[1]["step_flops"] == 4 * flops.training
    info = find_checkpoints(tmp_path / "run" / "checkpoints")[0]
    state, data_state = restore(info, run.make_abstract_state("dense finish"))
    assert data_state == {"next_index": 40}
    masks = get_weight_masks(state.sparsity.masks)
    for mask in masks.values():
        groups = np.asarray(mask).reshape(2, mask.shape[1] // 4, 4, -1)
        assert (groups.sum(2) == 2).all(), "two of four along the contracted axis"
    assert set(masks) == {"mlp/up", "mlp/down"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            _MASKED | {"data__mask_fraction": 2.0},
            r"data.mask_fraction=2.0: expected .* in \[0, 1\)",
        ),
        (
            {"data__source": "idx:/x", "data__patch_size": 4, "model__vocab_size": 300},
            "model.vocab_size must be 0 with patches, got 300",
        ),
        ({"data__image_size": 4}, "data.image_size=4 does not apply to source='text:"),
        ({"optimizer__initial_fraction": 1.5}, "optimizer.initial_fraction must be in"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse_config(make_settings(tmp_path, **{"recipe__name": "dense"} | changes))
