"""Attention and weights made sparse in one run: phases, bits, resumption, FLOPs."""

import jax
import numpy as np
import pytest

from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.recipes import Phase, Recipe
from sparsejax.report.metrics import read_metrics
from sparsejax.strict_json import load_json
from tests.training.runs import (
    NUM_STEPS,
    assert_documented,
    copy_until,
    load_end,
    make_settings,
    train,
    train_and_listen,
)

# Attention switches after step 6, the dense finish begins after step 8.
_CHAINED = {
    "recipe__name": "spion+fst",
    "recipe__fst__dense_fraction": 0.2,
    "recipe__fst__refresh_steps": 2,
    "checkpoint__keep_last": NUM_STEPS,
}
_PHASES = ["dense + sparse", "sparse + sparse", "sparse + dense finish"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("corpus"), **_CHAINED)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run of both, and how often programs were compiled between two of its lines."""
    workdir = tmp_path_factory.mktemp("chained")
    summary, events = train_and_listen(settings, workdir)
    return workdir, summary, events


def _assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.ci
def test_phases_interleave_and_each_is_compiled_once(finished):
    workdir, summary, events = finished
    assert_documented(workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    begun = {row["phase"]: row["step"] for row in rows if row["kind"] == "phase"}
    assert begun == dict(zip(_PHASES, (0, 6, 8), strict=True))
    assert summary["recipe"] == "spion-cf+fst"
    # Between the first line of a phase and the next one nothing is compiled.
    starts = [i for i, event in enumerate(events) if event.startswith("phase ")]
    ends = [i for i, event in enumerate(events) if " ends: " in event] + [len(events)]
    assert len(starts) == len(ends) == 3
    for start, end in zip(starts, ends, strict=True):
        assert "compiled" not in events[start:end]


@pytest.mark.ci
def test_flops_of_both_add_up(finished):
    workdir, _, _ = finished
    totals = load_json((workdir / "flops.json").read_text())
    assert {name: entry["steps"] for name, entry in totals.items()} == dict(
        zip(_PHASES, (6, 2, 2), strict=True)
    )
    share = {
        name: sum(sum(entry[p].values()) for p in ("forward", "backward", "update"))
        / sum(entry["dense_equivalent"].values())
        for name, entry in totals.items()
    }
    dense_attention, both, dense_weights = (share[name] for name in _PHASES)
    # Both save, and what they save adds up.
    assert both < min(dense_attention, dense_weights) < 1
    np.testing.assert_allclose(1 - both, (1 - dense_attention) + (1 - dense_weights), rtol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("step", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 7, 8))])
def test_it_resumes_bit_for_bit_across_each_switch(step, settings, finished, tmp_path):
    workdir, _, _ = finished
    resumed = copy_until(workdir, step, tmp_path / "resumed")
    train(settings, resumed)
    _assert_same(load_end(settings, resumed), load_end(settings, workdir))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chained", "alone", "part"),
    [("spion+dense", "spion", "attention"), ("fst+dense", "fst", "weights")],
)
def test_beside_a_dense_one_each_trains_as_it_does_alone(chained, alone, part, tmp_path):
    ends = {}
    for name in (chained, alone):
        settings = make_settings(tmp_path, **_CHAINED | {"recipe__name": name})
        train(settings, tmp_path / name)
        ends[name], _ = load_end(settings, tmp_path / name)
    _assert_same(ends[chained].params, ends[alone].params)
    _assert_same(ends[chained].sparsity.masks, ends[alone].sparsity.masks)
    _assert_same(ends[chained].sparsity.statistics[part], ends[alone].sparsity.statistics)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fst+rigl", "two methods of which one at most prunes weights; fst and rigl do"),
        ("spion+sat", "the second recipe of a chain must leave attention to the first"),
        ("spion+fst+dense", "one method, or two different ones joined by '\\+'"),
        ("fst+fst", "two different ones"),
        ("spion+fsst", "recipe.name must be one of .*, got 'spion\\+fsst'"),
    ],
)
def test_names_that_cannot_be_chained_are_refused(name, message, tmp_path):
    settings = make_settings(tmp_path, recipe__name=name, recipe__sat__density=0.5)
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def make_attention_recipe(facts):
    """Return a recipe of one's own, without weights."""
    assert facts.num_steps == NUM_STEPS and facts.length == 64 and facts.patterns == {}
    first = Phase("dense", last_step=4)
    return Recipe("mine", (first, Phase("still dense", pruned_logits="zero")))


_NO_RECIPE, make_nothing = "text", lambda facts: None


def make_incomplete(facts):
    """Forget the phases."""
    return Recipe("incomplete")  # pyright: ignore[reportCallIssue]


def make_twice(facts):
    """Return a recipe whose phases cannot be told apart."""
    return Recipe("twice", (Phase("x", last_step=2), Phase("x")))


def make_late(facts):
    """Return a recipe whose first phase ends after the run."""
    return Recipe("late", (Phase("x", last_step=99), Phase("y")))


@pytest.mark.slow
def test_a_recipe_of_ones_own_trains_and_the_run_says_so(tmp_path):
    name = f"{__name__}:make_attention_recipe"
    settings = make_settings(tmp_path, recipe__name=name)
    summary = train(settings, tmp_path / "run")
    assert summary["recipe"] == "mine"
    recorded = load_json((tmp_path / "run" / "checkpoints" / "run.json").read_text())["config"][
        "recipe"
    ]
    assert recorded == {"name": name, "own": {"sparse_weights": ""}}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "phase"] == [0, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "No module named 'no_such_module'"),
        (f"{__name__}:make_it", "has no function 'make_it'"),
        (f"{__name__}:_NO_RECIPE", "has no function '_NO_RECIPE'"),
        (":make", "the module and name of a function"),
        (f"{__name__}:make_nothing", "must return a sparsejax.recipes.Recipe, got <class 'None"),
        (
            f"{__name__}:make_incomplete",
            "must return a sparsejax.recipes.Recipe, but fails with TypeError: .* 'phases'",
        ),
        (f"{__name__}:make_twice", r"phases of different names, got \['x', 'x'\]"),
        (f"{__name__}:make_late", "num_steps must be above 99, .* phase 'x' ends, got 10"),
    ],
)
def test_what_is_no_recipe_is_refused(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse_config(make_settings(tmp_path, recipe__name=name))
