"""Runs that are killed at named moments end like those that are let alone."""

import random
import subprocess
import sys

import pytest

from benchmarks.environment import ROOT
from benchmarks.kill import MOMENTS, find_differences, plan_kills


def test_every_moment_has_its_turn_and_is_reached():
    counts = dict.fromkeys(MOMENTS, 3) | {"a batch is copied": 18}
    del counts["a checkpoint is read"]
    rng = random.Random(0)
    plans = [plan_kills(counts, rng, number) for number in range(len(MOMENTS))]
    assert {kill.moment for kills in plans for kill in kills} == {*MOMENTS}
    for kills in plans:
        assert 1 <= kills[0].count <= counts[kills[0].moment]


def test_differences_are_found_and_named():
    one = {"a": {"b": [1, 2.0]}, "c": float("nan")}
    assert list(find_differences(one, {"a": {"b": [1, 2.0]}, "c": float("nan")})) == []
    other = {"a": {"b": [1, 2.5]}, "c": 1, "d": None}
    found = list(find_differences(one, other))
    assert found == ["/a/b: [1, 2.5] instead of [1, 2.0]", "/c: 1 instead of nan"]


@pytest.mark.ci
def test_killed_runs_end_like_others(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kill", "--runs=2", "--seed=3"]
    command += [f"--output={tmp_path / 'kill.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs ended like those that were let alone" in done.stdout
