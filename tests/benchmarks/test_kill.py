"""Runs that are killed at named moments end like those that are let alone."""

import random
import subprocess
import sys

import pytest

from benchmarks import kill
from benchmarks.environment import ROOT
from benchmarks.kill import MOMENTS, find_differences, list_names, plan_kills
from benchmarks.tiny_runs import RUNS
from sparsejax.recipes.registry import RECIPES


def test_every_moment_has_its_turn_and_is_reached():
    counts = dict.fromkeys(MOMENTS, 3) | {"a batch is copied": 18}
    del counts["a checkpoint is read"]
    rng = random.Random(0)
    plans = [plan_kills(counts, rng, number) for number in range(len(MOMENTS))]
    assert {kill.moment for kills in plans for kill in kills} == {*MOMENTS}
    for kills in plans:
        assert 1 <= kills[0].count <= counts[kills[0].moment]


def test_each_recipe_has_the_moments_in_turn(tmp_path, monkeypatch):
    firsts = []
    monkeypatch.setattr(kill, "keep_programs", lambda folder: None)
    monkeypatch.setattr(kill, "make_reference", lambda settings, folder: {})
    monkeypatch.setattr(kill, "plan_kills", lambda counts, rng, first: firsts.append(first) or [])
    monkeypatch.setattr(kill, "kill_and_resume", lambda settings, folder, kills: [])
    assert kill.main([f"--output={tmp_path / 'kill.json'}"]) == 0
    assert {*RECIPES} < {*RUNS} and len(firsts) == 40
    assert {*firsts} >= {*range(len(MOMENTS))}
    for i in range(len(RUNS)):
        of_recipe = firsts[i :: len(RUNS)]
        assert of_recipe == [*range(i, i + len(of_recipe))]


def test_names_are_those_of_all_files_but_for_chance_and_clock(tmp_path):
    for name in ("tensorboard/events.out.tfevents.17.01.host", "4/state/d/" + 8 * "9ac5", "4/mark"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_names(tmp_path) == ["4", "4/mark", "4/state", "4/state/d", "tensorboard"]


def test_differences_are_found_and_named():
    one = {"a": {"b": [1, 2.0]}, "c": float("nan")}
    assert list(find_differences(one, {"a": {"b": [1, 2.0]}, "c": float("nan")})) == []
    other = {"a": {"b": [1, 2.5]}, "c": 1, "d": None}
    found = list(find_differences(one, other))
    assert found == ["/a/b: [1, 2.5] instead of [1, 2.0]", "/c: 1 instead of nan"]


@pytest.mark.slow
def test_killed_runs_end_like_others(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kill", "--runs=2", "--seed=3"]
    command += [f"--output={tmp_path / 'kill.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs ended like those that were let alone" in done.stdout
