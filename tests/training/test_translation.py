"""An encoder-decoder through settings, step, loop and checkpoints: it learns to copy sentences."""

import random

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.data import describe_data, make_data
from sparsejax.masks import transposable_mask
from sparsejax.recipes import get_weight_masks
from sparsejax.report.metrics import read_metrics
from sparsejax.tools.evaluate import evaluate
from sparsejax.tools.programs import make_abstract_batch
from sparsejax.training.setup import compile_phase, prepare_run
from tests.training.runs import copy_until, load_end, make_settings, train

_NUM_STEPS, _DENSE_STEPS = 120, 40
_LAYERS = ("mlp/up", "mlp/down", "decoder/mlp/up", "decoder/mlp/down")
_COPY = {
    "num_steps": _NUM_STEPS,
    "eval_every_steps": 60,
    "num_eval_batches": 0,
    "model__num_layers": 1,
    "model__num_decoder_layers": 2,
    "model__mlp_activation": "relu",
    "model__dropout_rate": 0.03,
    "data__sequence_length": 16,
    "data__batch_size": 32,
    "optimizer__learning_rate": 1e-2,
    "optimizer__schedule": "inverse_sqrt",
    "optimizer__warmup_fraction": 10 / _NUM_STEPS,
    "recipe__name": "fst",
    "recipe__fst__sparse_weights": "(decoder/)?mlp/.*=2:4 transposable",
    "recipe__fst__decay_rate": 1e-4,
    "recipe__fst__refresh_steps": 20,
    "recipe__fst__dense_fraction": _DENSE_STEPS / _NUM_STEPS,
    "checkpoint__every_steps": 20,
    "checkpoint__keep_last": 10,
}


def _make_settings(folder, **changes):
    """Return settings of a run that copies words of four letters."""
    draw = random.Random(0)
    for split, count in (("train", 400), ("validation", 40)):
        words = ["".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(count)]
        for side in ("src", "tgt"):
            (folder / f"{split}.{side}").write_text("".join(f"{word}\n" for word in words))
    return make_settings(folder, **{"data__source": f"pairs:{folder}"} | _COPY | changes)


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    settings = _make_settings(tmp_path_factory.mktemp("pairs"))
    workdir = tmp_path_factory.mktemp("copy")
    summary = train(settings, workdir)
    return settings, workdir, summary


def _restore(settings, workdir, step):
    (info,) = [i for i in find_checkpoints(workdir / "checkpoints") if i.step == step]
    run = prepare_run(parse_config(settings))
    return restore(info, run.make_abstract_state(info.metadata["phase"]))


@pytest.mark.slow
def test_a_run_learns_to_copy(trained):
    settings, workdir, summary = trained
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[0]["loss"] > 5
    # Words of 1 to 9 letters out of 4 have ln 9 + 5 ln 4 nats in 6 tokens: who does not read the
    # source cannot get below 1.52.
    assert rows[-1]["loss"] < 1.3
    assert summary["validation_loss"] < 1.3
    assert rows[19]["learning_rate"] == pytest.approx(1e-2 * (10 / 20) ** 0.5, rel=1e-5)
    again = evaluate(parse_config(settings), workdir)
    assert again["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)


@pytest.mark.ci
def test_masks_of_both_stacks_are_searched_for_by_name(trained):
    settings, workdir, _ = trained
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "flip_rate" in row]
    assert [row["step"] for row in rows] == [20, 40, 60, 80]
    for row in rows:
        found = {n.removeprefix("flip_rate/"): len(row[n]) for n in row if n[:10] == "flip_rate/"}
        assert found == dict(zip(_LAYERS, (1, 1, 2, 2), strict=True))
    state, _ = _restore(settings, workdir, 80)
    masks = get_weight_masks(state.sparsity.masks)
    assert set(masks) == set(_LAYERS)
    for name, mask in masks.items():
        stack, layer = state.params["blocks"]["mlp"], name.rpartition("/")[2]
        if name.startswith("decoder/"):
            stack = state.params["decoder"]["blocks"]["mlp"]
        np.testing.assert_array_equal(mask, transposable_mask(stack[layer]["kernel"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [pytest.param(40, marks=pytest.mark.slow), 80], ids=["sparse", "at_the_switch"]
)
def test_resuming_is_bit_exact(step, trained, tmp_path):
    settings, workdir, _ = trained
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    (got, data), (expected, expected_data) = (load_end(settings, x) for x in (resumed, workdir))
    assert data == expected_data
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    losses = [
        [
            (row["step"], row["loss"])
            for row in read_metrics(folder / "metrics.jsonl")
            if row["kind"] == "train"
        ]
        for folder in (resumed, workdir)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == _NUM_STEPS


@pytest.mark.slow
def test_training_is_smoothed_and_validation_is_not(tmp_path):
    settings = _make_settings(
        tmp_path, label_smoothing=0.25, model__dropout_rate=0.0, recipe__name="dense"
    )
    run = prepare_run(parse_config(settings))
    host_batch, state = next(run.data.train), run.create_state()
    batch = run.put_batch(host_batch)
    programs = compile_phase(run, run.recipe.phases[0], batch)
    sums = jax.device_get(programs.eval_step(state, batch, None))
    model = nnx.merge(run.graphdef, state.params, state.sparsity.masks)
    logits = jax.jit(
        lambda batch: (
            model(
                batch["inputs"], decoder_tokens=batch["decoder_inputs"], mask=batch["mask"]
            ).logits
        )
    )(host_batch)
    losses = -np.asarray(jax.nn.log_softmax(logits))
    real = host_batch["loss_weights"] > 0
    plain = np.take_along_axis(losses, host_batch["targets"][..., None], -1)[..., 0][real]
    assert sums["count"] == real.sum()
    np.testing.assert_allclose(sums["loss"], plain.sum(), rtol=1e-5)
    _, metrics = programs.train_step(state, batch, None)
    smoothed = 0.75 * plain.mean() + 0.25 * losses.mean(-1)[real].mean()
    assert abs(smoothed - plain.mean()) > 1e-3
    np.testing.assert_allclose(metrics["loss"], smoothed, rtol=1e-5)


def test_abstract_batches_are_those_of_the_data(tmp_path):
    config = parse_config(_make_settings(tmp_path))
    batch = next(make_data(config.data).train)
    expected = {name: (array.shape, array.dtype) for name, array in batch.items()}
    abstract = make_abstract_batch(config, describe_data(config.data))
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__num_decoder_layers": 0, "recipe__name": "dense"},
            "model.num_decoder_layers must be at least 1 for data.source='pairs:.*', got 0",
        ),
        (
            {"data__source": "stdlib"},
            "model.num_decoder_layers must be 0 for data.source='stdlib', got 2",
        ),
        (
            {"recipe__name": "spion"},
            "recipe.name must be one without sparse attention .*, got 'spion'",
        ),
        (
            {"recipe__name": "static_attention", "recipe__static_attention__density": 1.0},
            "recipe.name must be .* for an encoder-decoder, whose attention is dense, got 'static",
        ),
        (
            {"recipe__name": "sat", "recipe__sat__density": 1.0},
            "recipe.name must be .* attention is dense, got 'sat'",
        ),
        (
            {"recipe__fst__sparse_weights": "decoder/cross_attention/.*=2:4"},
            "'decoder/mlp/down'.*, but 'decoder/cross_attention/.*' matches none",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be a finite number .* got nan"),
        (
            {"optimizer__warmup_fraction": 0.0},
            r"optimizer.warmup_fraction must be in \(0, 1\), got 0",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, tmp_path):
    settings = _make_settings(tmp_path, **{"recipe__spion__quantile": 0.5} | changes)
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_a_wrong_type_is_named(tmp_path):
    settings = _make_settings(tmp_path)
    assert parse_config(settings | {"label_smoothing": 0}).label_smoothing == 0.0
    with pytest.raises(ConfigError, match="label_smoothing must be of type float, got 'x'"):
        parse_config(settings | {"label_smoothing": "x"})
    with pytest.raises(ConfigError, match=r"num_steps must be of type int, got 2\.0"):
        parse_config(settings | {"num_steps": 2.0})
