"""Train what an experiment asks for as `train.py` would be run by hand, and keep what came out.

Every run has a folder of its own. A finished run is not run again and an unfinished one resumes,
so the same command continues an experiment that was cut off. Runs of quality have one core each and
tell nothing of time, because anything may run beside them; runs of timing have the whole machine,
take turns and refuse one that is busy.
"""

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from benchmarks.environment import ROOT
from benchmarks.experiments.plan import Experiment, Overrides, Setting, Tuning
from benchmarks.records import Results

type Values = dict[str, Any]
"""Of one run: "summary", "curves" and, of runs of quality, "seconds" of processors."""

# Of the machine's speed, which runs of quality do not know.
_SPEEDS = ("_seconds", "_tokens_per_second", "_step_speedup")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      key: what it is recorded under.
      setting: what is trained, with all that is changed in it.
      workdir: its folder.
    """

    key: Mapping[str, str | int]
    setting: Setting
    workdir: pathlib.Path


def run_experiment(
    experiment: Experiment,
    *,
    workers: int = 1,
    runs_dir: pathlib.Path = ROOT / "runs",
    results_dir: pathlib.Path = ROOT / "benchmarks" / "results",
    trainer: Sequence[str] = (sys.executable, "train.py"),
) -> Results:
    """Train what is not trained yet, and record each run in `<name>.json` when it ends.

    Args:
      experiment: what to run.
      workers: runs at a time, each with a core of its own; 1 for runs of timing.
      runs_dir: folder of the runs: `<runs_dir>/<experiment>/<row>-<seed>-<digest>`.
      results_dir: folder of the results.
      trainer: command of the trainer, run in the root of the repository.

    Returns:
      Results, one record per row and seed, and per candidate and seed of the tuning.

    Raises:
      RuntimeError: if a run fails, or if a timing run finds the machine busy.
      ValueError: if there are more workers than cores, or workers beside a timing run.
    """
    cores = _list_cores()
    if not 1 <= workers <= (len(cores) if experiment.kind == "quality" else 1):
        most = len(cores) if experiment.kind == "quality" else "1, for timing,"
        raise ValueError(f"workers must be from 1 to {most}, got {workers}")
    results = Results(results_dir / f"{experiment.name}.json")
    for runs in (
        lambda: list_candidates(experiment, runs_dir),
        lambda: list_runs(experiment, results, runs_dir),
    ):
        missing = [run for run in runs() if run.key not in results]
        if missing:
            print(f"{experiment.name}: {_announce(missing, results, workers)}", flush=True)
            _run_all(experiment, missing, results, cores[:workers], trainer)
    return results


def list_runs(
    experiment: Experiment, results: Results, runs_dir: pathlib.Path = ROOT / "runs"
) -> list[Run]:
    """List the runs that are reported, seed by seed.

    Args:
      results: has every run of the tuning, on which the settings may depend.
      runs_dir: folder of the runs.
    """
    best = {} if experiment.tuning is None else choose_candidates(experiment, results)
    return [
        _make_run(experiment, experiment.kind, row, seed, setting, best, runs_dir)
        for seed in experiment.seeds
        for row, setting in experiment.settings.items()
    ]


def list_candidates(experiment: Experiment, runs_dir: pathlib.Path = ROOT / "runs") -> list[Run]:
    """List the runs of the tuning, seed by seed; none if there is nothing to tune."""
    tuning = experiment.tuning
    if tuning is None:
        return []
    return [
        _make_candidate(experiment, tuning, name, index, seed, runs_dir)
        for seed in tuning.seeds
        for name, candidates in tuning.candidates.items()
        for index in range(len(candidates))
    ]


def choose_candidates(experiment: Experiment, results: Results) -> dict[str, Overrides]:
    """Return the candidate of the least mean of each tuned setting.

    Args:
      experiment: with a tuning.
      results: has every run of it.
    """
    best: dict[str, Overrides] = {}
    tuning = experiment.tuning
    assert tuning is not None
    for name, candidates in tuning.candidates.items():
        means = [
            statistics.fmean(
                results[_make_candidate(experiment, tuning, name, index, seed).key]["values"][
                    "summary"
                ][tuning.metric]
                for seed in tuning.seeds
            )
            for index in range(len(candidates))
        ]
        best[name] = candidates[means.index(min(means))]
    return best


def group_by_row(experiment: Experiment, results: Results) -> dict[str, list[dict[str, Any]]]:
    """Group records by row as it is set now; those of earlier settings only stay in the file.

    Returns:
      dict, row -> records in the order of the seeds; rows without a record are left out, and all
      are while the tuning is not complete.
    """
    if any(run.key not in results for run in list_candidates(experiment)):
        return {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in list_runs(experiment, results):
        if run.key in results:
            groups.setdefault(str(run.key["row"]), []).append(results[run.key])
    return {row: groups[row] for row in experiment.settings if row in groups}


def train_again(
    experiment: Experiment, run: Run, *, trainer: Sequence[str] = (sys.executable, "train.py")
) -> dict[str, Any]:
    """Train a run on one core in an empty folder, whatever is recorded.

    Args:
      run: with the folder to train in.

    Returns:
      dict of "values" and "environment", as a record has them.
    """
    cores = _enqueue(_list_cores()[:1])
    with concurrent.futures.ThreadPoolExecutor(
        1, initializer=_take_core, initargs=(cores,)
    ) as pool:
        values = pool.submit(_train_and_collect, experiment, run, trainer).result()
        environment = pool.submit(_describe_environment).result()
    return {"values": values, "environment": environment}


def _make_run(
    experiment: Experiment,
    kind: Literal["quality", "timing", "tuning"],
    row: str,
    seed: int,
    setting: Setting,
    best: Mapping[str, Overrides],
    runs_dir: pathlib.Path,
) -> Run:
    overrides = {**setting.overrides}
    if setting.tuned is not None:
        overrides |= best[setting.tuned]
    if experiment.by_seed is not None:
        overrides |= experiment.by_seed(seed)
    setting = Setting(config=setting.config, overrides=overrides)
    key = {
        "row": row,
        "seed": seed,
        "kind": kind,
        "config": setting.config,
        "overrides": json.dumps(overrides, sort_keys=True),
    }
    # A changed setting trains in a folder of its own.
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return Run(key, setting, runs_dir / experiment.name / f"{row}-{seed}-{digest}")


def _make_candidate(
    experiment: Experiment,
    tuning: Tuning,
    name: str,
    index: int,
    seed: int,
    runs_dir: pathlib.Path = ROOT / "runs",
) -> Run:
    setting = tuning.settings[name]
    overrides = {**setting.overrides, **tuning.candidates[name][index]}
    candidate = Setting(config=setting.config, overrides=overrides)
    row = f"{name}, candidate {index}"
    return _make_run(experiment, "tuning", row, seed, candidate, {}, runs_dir)


def _run_all(
    experiment: Experiment,
    runs: Sequence[Run],
    results: Results,
    cores: Sequence[int | None],
    trainer: Sequence[str],
) -> None:
    """Run all, record each as it ends, and then raise the first failure."""
    stopped, failure = threading.Event(), None

    def train(run: Run) -> Values | None:
        return None if stopped.is_set() else _train_and_collect(experiment, run, trainer)

    # A run of timing has all cores.
    taken = [None] if experiment.kind == "timing" else cores
    with concurrent.futures.ThreadPoolExecutor(
        len(taken), initializer=_take_core, initargs=(_enqueue(taken),)
    ) as pool:
        facts = pool.submit(_describe_environment).result()
        futures = {pool.submit(train, run): run for run in runs}
        try:
            for future in concurrent.futures.as_completed(futures):
                if (error := future.exception()) is not None:
                    # What has begun goes on to its end, and is recorded.
                    stopped.set()
                    failure = failure or error
                elif (values := future.result()) is not None:
                    now = datetime.datetime.now(datetime.UTC)
                    environment = facts | {"date": now.strftime("%Y-%m-%d %H:%M")}
                    results.record(futures[future].key, values, environment)
        finally:
            stopped.set()
    if failure is not None:
        raise failure


def _train_and_collect(experiment: Experiment, run: Run, trainer: Sequence[str]) -> Values:
    timing = experiment.kind == "timing"
    if timing:
        _wait_until_idle(experiment.max_busy_cores)
    print(f"{experiment.name}: {run.key['row']}, seed {run.key['seed']}", flush=True)
    seconds = _train(run, trainer)
    values = _collect(experiment, run.workdir)
    if run.key["kind"] == "tuning":
        # A candidate is judged by its summary, and curves make files large.
        values["curves"] = {}
    return values if timing else values | {"seconds": round(seconds, 1)}


def _train(run: Run, trainer: Sequence[str]) -> float:
    """Train, or go on, and return the seconds that cores computed for it."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    command = [*trainer, f"--config={run.setting.config}", f"--workdir={run.workdir}"]
    overrides = {**run.setting.overrides, "seed": run.key["seed"]}
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    with open(run.workdir.with_name(f"{run.workdir.name}.log"), "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # A pause of the run, or another process on its core, does not count.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    summary = run.workdir / "summary.json"
    if process.returncode or not summary.exists():
        raise RuntimeError(
            f"{' '.join(command)} ended with exit code {process.returncode} and "
            f"{'a' if summary.exists() else 'no'} summary; see {log.name}"
        )
    return usage.ru_utime + usage.ru_stime


def _collect(experiment: Experiment, workdir: pathlib.Path) -> Values:
    summary = json.loads((workdir / "summary.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curves = {
        metric: [[row["step"], row[metric]] for row in rows if metric in row]
        for metric in experiment.curves.values()
    }
    # Paths say nothing about the result and differ between machines.
    left_out = ("workdir", "checkpoint", *(_SPEEDS if experiment.kind == "quality" else ()))
    summary = {key: value for key, value in summary.items() if not key.endswith(left_out)}
    if experiment.measure is not None:
        summary |= experiment.measure(workdir)
    return {"summary": summary, "curves": curves}


def _announce(missing: Sequence[Run], results: Results, workers: int) -> str:
    seconds = [r["values"]["seconds"] for r in results.records if "seconds" in r["values"]]
    text = f"{len(missing)} runs to do, {workers} at a time"
    if not seconds:
        return text
    return f"{text}, some {len(missing) * statistics.fmean(seconds) / workers / 3600:.1f} hours"


def _list_cores() -> list[int | None]:
    """List the cores that this process may use; None where the system does not say which."""
    if hasattr(os, "sched_getaffinity"):
        return [*sorted(os.sched_getaffinity(0))]
    return [None] * (os.cpu_count() or 1)


def _enqueue(cores: Sequence[int | None]) -> queue.SimpleQueue:
    cores_left: queue.SimpleQueue = queue.SimpleQueue()
    for core in cores:
        cores_left.put(core)
    return cores_left


def _take_core(cores: queue.SimpleQueue) -> None:
    """Keep this thread, and the processes that it starts, on a core of its own."""
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})


def _describe_environment() -> dict[str, str]:
    # In a process of its own: asking JAX for its device would take the GPU's memory from the runs.
    code = (
        "import json; from benchmarks.environment import describe_environment as d; "
        "print(json.dumps(d()))"
    )
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def _wait_until_idle(max_busy_cores: float, *, patience_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + patience_seconds
    while (busy := _count_busy_cores()) > max_busy_cores:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"a timing run needs the machine for itself, but {busy:.1f} cores are busy "
                f"(max_busy_cores={max_busy_cores}); stop what else runs and call again"
            )


def _count_busy_cores(sample_seconds: float = 1.0) -> float:
    """Measure how many cores compute while this process sleeps (Linux)."""

    def read() -> tuple[int, int]:
        ticks = [int(tick) for tick in pathlib.Path("/proc/stat").read_text().split()[1:9]]
        return sum(ticks), sum(ticks[3:5])  # 3 and 4: idle, waiting for a disk

    total, idle = read()
    time.sleep(sample_seconds)
    later_total, later_idle = read()
    share_idle = (later_idle - idle) / max(later_total - total, 1)
    # Ticks of waiting for a disk may go backwards.
    return min(max(1.0 - share_idle, 0.0), 1.0) * (os.cpu_count() or 1)
