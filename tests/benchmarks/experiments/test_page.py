"""The page of claims is what the records say, and nothing else."""

import dataclasses

from benchmarks.experiments.catalogue import EXPERIMENTS
from benchmarks.experiments.page import PAGE, make_page
from benchmarks.experiments.plan import Comparison, Experiment, Setting
from benchmarks.experiments.running import list_runs
from benchmarks.records import Results

STUDY = Experiment(
    name="study",
    kind="quality",
    settings={"dense": Setting(config="a.py"), "sparse": Setting(config="b.py")},
    seeds=(0, 1, 2),
    columns={"loss": "validation_loss"},
    comparisons=[
        Comparison(
            row="sparse",
            against="dense",
            metric="loss",
            better="less",
            claim="sparse is better",
            method="Us et al.",
        ),
        Comparison(row="dense", against="sparse", metric="loss", better="less"),
    ],
)


def record(folder, losses, seeds=3, shift=0.001):
    """Record runs with a loss for each row, which seeds shift alike but for one of the dense."""
    results = Results(folder / "study.json")
    for run in list_runs(STUDY, results):
        seed = run.key["seed"]
        if seed < seeds:
            loss = losses[run.key["row"]] + seed + shift * (seed == 1) * (run.key["row"] == "dense")
            results.record(run.key, {"summary": {"validation_loss": loss}}, {})
    return make_page([STUDY], folder)


def test_the_committed_page_is_that_of_the_committed_records():
    assert PAGE.read_text() == make_page(EXPERIMENTS.values())


def test_a_claim_is_judged_by_its_interval(tmp_path):
    page = record(tmp_path, {"dense": 2.0, "sparse": 1.9})
    assert page.count("## ") == 1 and "## Us et al." in page
    (line,) = [line for line in page.splitlines() if line.startswith("| sparse is better")]
    assert "sparse – dense, loss: -0.1003 ± 0.0014, better in 3 of 3" in line
    assert "**confirmed**: sparse has less loss than dense" in line
    page = record(tmp_path, {"dense": 2.0, "sparse": 2.1})
    assert "**not confirmed**: sparse has more loss than dense" in page
    page = record(tmp_path, {"dense": 2.0, "sparse": 2.0})
    assert "**not decidable here**: cannot be told apart; " in page
    assert "pairs would tell so large a difference" in page


def test_rows_that_are_equal_are_said_to_be(tmp_path):
    page = record(tmp_path, {"dense": 2.0, "sparse": 2.0 + 1e-9}, shift=1e-9)
    assert "loss: +0.0000 ± 0.0000, better in 0 of 3" in page
    assert "**not decidable here**: equal in the digits shown" in page


def test_a_claim_without_pairs_is_not_judged(tmp_path):
    page = record(tmp_path, {"dense": 2.0, "sparse": 1.0}, seeds=1)
    assert "| sparse is better | not measured yet: study | **not decidable here** |" in page


def test_a_claim_stands_once_above_all_its_rivals(tmp_path):
    first = STUDY.comparisons[0]
    again = dataclasses.replace(first, margin=0.01)
    study = dataclasses.replace(STUDY, comparisons=[first, again])
    record(tmp_path, {"dense": 2.0, "sparse": 1.9})
    page = make_page([study], tmp_path)
    assert page.count("sparse is better") == 1 and page.count("\n|  | sparse – dense") == 1
    assert make_page([study], tmp_path / "empty").count("not measured yet") == 1


def test_no_verdict_falls_before_all_pairs_are_there(tmp_path):
    page = record(tmp_path, {"dense": 2.0, "sparse": 1.0}, seeds=2)
    assert "better in 2 of 2" in page
    assert "**not decidable here**: 2 of 3 pairs so far, nothing is said before" in page


def test_a_question_of_ours_is_no_claim(tmp_path):
    ours = dataclasses.replace(STUDY, comparisons=STUDY.comparisons[1:])
    assert "study" not in make_page([ours], tmp_path)
