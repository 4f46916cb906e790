"""Steps that are not finite are skipped, counted across restarts, and in the end fail the run."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.checkpoint.files import find_checkpoints
from sparsejax.report.metrics import read_metrics
from sparsejax.training import loop
from sparsejax.training.loop import NonFiniteError
from sparsejax.training.step import explain_skip, make_train_step
from tests.training import toy
from tests.training.runs import NUM_STEPS, make_settings, train

_DIVERGING = {
    "recipe__name": "dense",
    "model__num_layers": 1,
    "optimizer__schedule": "constant",
    "optimizer__learning_rate": 1e30,
    "optimizer__clip_norm": 1e30,
    "num_eval_batches": 1,
}
_BREAKS = {
    "weights": lambda grads, state: (
        grads | {"model": {"table": grads["model"]["table"] / 0}},
        state,
    ),
    "recipe": lambda grads, state: (
        grads | {"recipe": {"scale": jnp.inf, "sum_of_maps": 0.0}},
        state,
    ),
    "moments": lambda grads, state: (grads, {"moment": jnp.float32(jnp.nan)}),
}


@pytest.mark.parametrize(
    "what",
    ["weights", *(pytest.param(what, marks=pytest.mark.ci) for what in ("recipe", "moments"))],
)
def test_a_step_to_what_is_not_finite_changes_nothing_but_the_counters(what):
    optimizer = toy.DESCENT._replace(
        update=lambda grads, state, *_, **__: _BREAKS[what](grads, state)
    )
    recipe = toy.make_recipe()
    start = dataclasses.replace(toy.make_state(recipe), opt_state={"moment": jnp.float32(0)})
    step = toy.jit(make_train_step(toy.GRAPHDEF, recipe, toy.PHASE, optimizer))
    once, metrics = step(start, toy.BATCH)
    twice, _ = step(once, toy.BATCH)
    assert metrics["skipped"] == 1
    assert explain_skip(metrics) == "the weights or the optimizer state would not be finite"
    assert (once.num_skipped, twice.num_skipped, twice.step) == (1, 2, 2)
    kept = [(state.params, state.opt_state, state.sparsity) for state in (start, twice)]
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_the_reason_is_told():
    fine = {"loss": 1.0, "grad_norm": 1.0}
    assert explain_skip(fine | {"loss": float("nan")}) == "the loss was not finite"
    assert explain_skip(fine | {"grad_norm": float("inf")}) == "the gradient was not finite"


def _stop_at(step, monkeypatch):
    """Let a signal arrive when a step's progress is shown."""

    def listen(text):
        if f" {step}/{NUM_STEPS} |" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "say", listen)


def _read_steps(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return repr([(r["step"], r["loss"], r["skipped"]) for r in rows if r["kind"] == "train"])


@pytest.mark.slow
def test_a_run_stopped_while_it_skips_fails_at_the_same_step(tmp_path, monkeypatch, capsys):
    settings = make_settings(tmp_path, **_DIVERGING, max_consecutive_skips=4)
    with pytest.raises(NonFiniteError) as failure:
        train(settings, tmp_path / "whole")
    assert "warning: step 3 skipped: the loss was not finite" in capsys.readouterr().out
    # The weights of step 2 are finite, but nothing can be trained from them.
    message = (
        "step 7 skipped, as were 5 in a row: the loss was not finite (max_consecutive_skips=4)"
    )
    good = "last good checkpoint: {}/checkpoints/00000001"
    assert str(failure.value) == f"{message}; {good.format(tmp_path / 'whole')}"
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert [info.step for info in find_checkpoints(checkpoints)] == [2, 1]

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        _stop_at(4, patch)
        assert train(settings, stopped) is None
    found = find_checkpoints(stopped / "checkpoints")
    assert [(info.step, info.good) for info in found] == [(5, False), (2, True), (1, True)]
    with pytest.raises(NonFiniteError) as failure:
        train(settings, stopped)
    assert str(failure.value) == f"{message}; {good.format(stopped)}"
    assert _read_steps(stopped) == _read_steps(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_too_short_to_reach_the_limit_fails_by_its_last_validation(tmp_path):
    settings = make_settings(tmp_path, **_DIVERGING, num_steps=4, max_consecutive_skips=10)
    for _ in range(2):
        # Step 2 led to weights that no later step could train from.
        message = "step 4: the last validation is not finite; last good checkpoint: .*/00000001$"
        with pytest.raises(NonFiniteError, match=message):
            train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.ci
def test_a_run_that_trains_nothing_fails_however_short_it_is(tmp_path):
    infinite = {"optimizer__learning_rate": 1e38, "optimizer__weight_decay": 1e10}
    infinite["optimizer__warmup_fraction"] = 0.0
    settings = make_settings(tmp_path, **_DIVERGING | infinite, num_steps=3)
    with pytest.raises(NonFiniteError, match=r"step 3 skipped, .* 3 in a row: .* \(num_steps=3\)"):
        train(settings, tmp_path / "run")


@pytest.mark.ci
def test_best_and_last_are_kept_where_validations_and_saves_do_not_meet(tmp_path, monkeypatch):
    losses = {3: 0.5, 6: 2.0, 9: 1.0, 10: 1.5}
    monkeypatch.setattr(
        loop,
        "compute_validation",
        lambda run, step, state, lists: {"validation_loss": losses[int(state.step)]},
    )
    monkeypatch.setattr(loop, "finish_run", lambda *_: {})
    settings = make_settings(
        tmp_path,
        recipe__name="dense",
        model__num_layers=1,
        eval_every_steps=3,
        checkpoint__every_steps=2,
        checkpoint__keep_last=2,
        checkpoint__keep_best=1,
    )
    train(settings, tmp_path / "run")
    found = find_checkpoints(tmp_path / "run" / "checkpoints")
    assert [(x.step, x.periodic) for x in found] == [(10, True), (8, True), (3, False)]
    assert found[-1].metrics == {"validation_loss": 0.5}
