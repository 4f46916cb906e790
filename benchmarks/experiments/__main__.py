"""Run an experiment, or train a row that is recorded again and compare.

    python -m benchmarks.experiments                     lists the experiments
    python -m benchmarks.experiments NAME --workers=2    trains what is missing
    python -m benchmarks.experiments NAME --again=ROW    trains that row with its first seed

Without anything missing, NAME alone trains the experiment's headline row again.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.catalogue import EXPERIMENTS
from benchmarks.experiments.page import PAGE, make_page
from benchmarks.experiments.plan import Experiment
from benchmarks.experiments.running import (
    list_candidates,
    list_runs,
    run_experiment,
    train_again,
)
from benchmarks.experiments.tables import compare_runs, write_report
from benchmarks.harness import RESULTS
from benchmarks.records import Results
from sparsejax.config.shipped import suggest


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for.

    Args:
      arguments: without the name of the program.

    Returns:
      int, the exit code: 1 if a row that was trained again differs on the same kind of CPU.

    Raises:
      SystemExit: if an argument is not known.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of an experiment")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--again", metavar="ROW", help="train this row again and compare")
    parsed = parser.parse_args(arguments)
    if parsed.name is None:
        list_experiments()
        return 0
    if parsed.name not in EXPERIMENTS:
        names = ", ".join(EXPERIMENTS)
        raise SystemExit(f"error: NAME must be one of {names}, got {parsed.name!r}")
    experiment = EXPERIMENTS[parsed.name]
    if parsed.again is not None and parsed.again not in experiment.settings:
        near = suggest(parsed.again, list(experiment.settings))
        raise SystemExit(f"error: {parsed.name} must have the row {parsed.again!r}{near}")
    workers = 1 if experiment.kind == "timing" else parsed.workers
    results = Results(RESULTS / f"{experiment.name}.json")
    missing = count_missing(experiment, results)
    if missing and parsed.again is None:
        try:
            run_experiment(experiment, workers=workers)
        finally:
            write_report(experiment, Results(results.path), RESULTS)
            PAGE.write_text(make_page(EXPERIMENTS.values()))
        return 0
    if experiment.kind == "timing":
        print(f"{experiment.name}: times are not repeated to the digit")
        return 0
    return repeat_row(experiment, results, parsed.again)


def list_experiments() -> None:
    """Print every experiment with its runs, those that are missing, and the hours it took."""
    for experiment in EXPERIMENTS.values():
        results = Results(RESULTS / f"{experiment.name}.json")
        num_runs = len(experiment.seeds) * len(experiment.settings)
        num_runs += len(list_candidates(experiment))
        seconds = [r["values"].get("seconds", 0.0) for r in results.records]
        hours = f", {sum(seconds) / 3600:.1f} hours of one core so far" if any(seconds) else ""
        missing = count_missing(experiment, results)
        print(f"{experiment.name:28} {num_runs:4} runs, {missing} missing{hours}")


def count_missing(experiment: Experiment, results: Results) -> int:
    """Return how many runs of tuning and rows have no record."""
    candidates = sum(run.key not in results for run in list_candidates(experiment))
    if candidates:
        return candidates + len(experiment.seeds) * len(experiment.settings)
    return sum(run.key not in results for run in list_runs(experiment, results))


def repeat_row(experiment: Experiment, results: Results, row: str | None) -> int:
    """Train a row with its first seed in an empty folder, and print it beside its record.

    Args:
      row: None = the headline.

    Returns:
      int, 1 if printed digits differ though the kind of CPU is the same.
    """
    row = row or experiment.headline or next(iter(experiment.settings))
    # Without its tuning nobody knows how a row trains.
    tuned = all(run.key in results for run in list_candidates(experiment))
    wanted = {"row": row, "seed": experiment.seeds[0]}
    runs = list_runs(experiment, results) if tuned else []
    runs = [run for run in runs if wanted.items() <= run.key.items() and run.key in results]
    if not runs:
        print(f"{experiment.name}: {row!r} is not recorded yet")
        return 1
    (run,) = runs
    with tempfile.TemporaryDirectory() as folder:
        again = train_again(experiment, dataclasses.replace(run, workdir=Path(folder) / "run"))
    text, equal = compare_runs(experiment, results[run.key], again)
    print(text)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
