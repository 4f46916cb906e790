"""Run training experiments as `train.py` would be run by hand, and make table and plot of them.

An experiment is a list of named settings, each trained with several seeds in a folder of its own.
A finished run is not run again and an unfinished one resumes, so the same command continues a
cut-off experiment. Quality and speed are separate experiments: quality runs tell nothing of time,
because anything may run beside them; timing runs refuse a busy machine and take turns.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from benchmarks.environment import ROOT
from benchmarks.records import Results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: a config and what is changed in it.

    Attributes:
      config: str, path from the root of the repository.
      overrides: key -> value, given as `--config.KEY=VALUE`.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question put to several settings.

    Attributes:
      name: str, names the files in `benchmarks/results` and the folder under `runs`.
      kind: "quality" or "timing".
      settings: row name -> Setting; the first row is what the others are compared with.
      seeds: tuple of int. The runs of one seed come one after the other, so the settings of a
        timing experiment take turns and drift of the machine falls on all of them.
      columns: column title -> key of `summary.json`.
      curves: axis title -> key of `metrics.jsonl`, each a panel of the plot.
      max_busy_cores: float, cores in use by others above which a timing run does not start.
    """

    name: str
    kind: Literal["quality", "timing"]
    settings: Mapping[str, Setting]
    seeds: tuple[int, ...]
    columns: Mapping[str, str]
    curves: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"validation loss": "validation_loss"}
    )
    max_busy_cores: float = 0.2


def static_attention(config: str, pattern: str, density: float) -> Setting:
    """Return a run whose attention keeps a fixed pattern of blocks.

    Args:
      config: str, path from the root of the repository.
      pattern: str, of `recipe.static_attention`.
      density: float, fraction of the visible blocks.
    """
    overrides = {
        "recipe.name": "static_attention",
        "recipe.static_attention.pattern": pattern,
        "recipe.static_attention.density": density,
    }
    return Setting(config=config, overrides=overrides)


def shorten(setting: Setting, num_steps: int, **overrides: Any) -> Setting:
    """Return a setting that trains no longer than a timing run needs.

    Args:
      **overrides: others, with "__" for the dots of a key.
    """
    every = ("num_steps", "eval_every_steps", "checkpoint.every_steps")
    changed = dict.fromkeys(every, num_steps)
    changed |= {name.replace("__", "."): value for name, value in overrides.items()}
    return dataclasses.replace(setting, overrides={**setting.overrides, **changed})


def run_named(experiments: Mapping[str, Experiment], arguments: Sequence[str]) -> None:
    """Run the experiment that a command line names.

    Args:
      experiments: name -> Experiment.
      arguments: sequence of one name.

    Raises:
      SystemExit: if it names none.
    """
    if len(arguments) != 1 or arguments[0] not in experiments:
        raise SystemExit(f"expected one of {list(experiments)}, got {list(arguments)}")
    run_experiment(experiments[arguments[0]])


def run_experiment(
    experiment: Experiment,
    *,
    runs_dir: pathlib.Path = ROOT / "runs",
    results_dir: pathlib.Path = ROOT / "benchmarks" / "results",
    trainer: Sequence[str] = (sys.executable, "train.py"),
) -> Results:
    """Train what is not trained yet, then write `<name>.json`, `<name>.md` and `<name>.png`.

    Args:
      experiment: what to run.
      runs_dir: folder of the runs: `<runs_dir>/<experiment>/<row>-<seed>`.
      results_dir: folder of the results.
      trainer: command of the trainer, run in the root of the repository.

    Returns:
      Results, one record per row and seed: `values` holds the run's `summary` and `curves`.

    Raises:
      RuntimeError: if a run fails, or if a timing run finds the machine busy.
    """
    results = Results(results_dir / f"{experiment.name}.json")
    for seed in experiment.seeds:
        for row, setting in experiment.settings.items():
            key = _make_key(experiment, row, seed)
            if key in results:
                continue
            if experiment.kind == "timing":
                _wait_until_idle(experiment.max_busy_cores)
            workdir = runs_dir / experiment.name / f"{row}-{seed}"
            print(f"{experiment.name}: {row}, seed {seed}, in {workdir}", flush=True)
            _train(setting, seed, workdir, trainer)
            results.record(key, _collect(experiment, workdir), _describe_environment())
    (results_dir / f"{experiment.name}.md").write_text(make_experiment_table(experiment, results))
    plot_curves(experiment, results, results_dir / f"{experiment.name}.png")
    return results


def make_experiment_table(experiment: Experiment, results: Results) -> str:
    """Make the Markdown table of an experiment, one line per setting.

    Args:
      experiment: names rows and columns.
      results: what has been run; rows without a run are left out.

    Returns:
      str; cells are mean ± standard deviation over seeds, for timing the median over the runs
      and their range.
    """
    title = "quality" if experiment.kind == "quality" else "speed"
    lines = [
        ["setting", "runs", *experiment.columns],
        ["---"] * (2 + len(experiment.columns)),
    ]
    for row, records in _group_by_row(experiment, results).items():
        summaries = [record["values"]["summary"] for record in records]
        cells = [
            _aggregate([summary[key] for summary in summaries if key in summary], experiment.kind)
            for key in experiment.columns.values()
        ]
        lines.append([row, str(len(records)), *cells])
    environments = {
        f"{record['environment']['device']}, jax {record['environment']['jax']}, "
        f"{record['environment']['date'][:10]}"
        for records in _group_by_row(experiment, results).values()
        for record in records
    }
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"**{experiment.name}** ({title}): {'; '.join(sorted(environments))}\n\n{table}"


def plot_curves(experiment: Experiment, results: Results, path: pathlib.Path) -> None:
    """Draw curves over steps: mean over seeds, shaded from least to most.

    Args:
      experiment: names the rows.
      results: what has been run.
      path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 * len(experiment.curves)), layout="constrained")
    figure.suptitle(experiment.name)
    panels = figure.subplots(len(experiment.curves), 1, squeeze=False)[:, 0]
    for (title, metric), axes in zip(experiment.curves.items(), panels, strict=True):
        axes.set(xlabel="step", ylabel=title)
        for index, (row, records) in enumerate(_group_by_row(experiment, results).items()):
            # A row without the metric keeps its colour free, so that panels agree.
            color = f"C{index}"
            curves = [dict(map(tuple, record["values"]["curves"][metric])) for record in records]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            values = [[curve[step] for curve in curves] for step in steps]
            axes.plot(steps, [statistics.fmean(v) for v in values], color=color, label=row)
            lowest, highest = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _train(setting: Setting, seed: int, workdir: pathlib.Path, trainer: Sequence[str]) -> None:
    overrides = {**setting.overrides, "seed": seed}
    workdir.mkdir(parents=True, exist_ok=True)
    command = [*trainer, f"--config={setting.config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    with open(workdir.with_name(f"{workdir.name}.log"), "a") as log:
        finished = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if finished.returncode or not (workdir / "summary.json").exists():
        raise RuntimeError(
            f"{' '.join(command)} ended with exit code {finished.returncode} and "
            f"{'a' if (workdir / 'summary.json').exists() else 'no'} summary; see {log.name}"
        )


def _collect(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    summary = json.loads((workdir / "summary.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curves = {
        metric: [[row["step"], row[metric]] for row in rows if metric in row]
        for metric in experiment.curves.values()
    }
    # Paths say nothing about the result and differ between machines.
    kept = {key: value for key, value in summary.items() if key not in ("workdir", "checkpoint")}
    return {"summary": kept, "curves": curves}


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


def _make_key(experiment: Experiment, row: str, seed: int) -> dict[str, str | int]:
    setting = experiment.settings[row]
    return {
        "row": row,
        "seed": seed,
        "kind": experiment.kind,
        "config": setting.config,
        "overrides": json.dumps(dict(setting.overrides), sort_keys=True),
    }


def _group_by_row(experiment: Experiment, results: Results) -> dict[str, list[dict[str, Any]]]:
    """Group records by row as it is set now; those of earlier settings only stay in the file."""
    groups = {
        row: [
            results[key]
            for seed in experiment.seeds
            if (key := _make_key(experiment, row, seed)) in results
        ]
        for row in experiment.settings
    }
    return {row: records for row, records in groups.items() if records}


def _aggregate(values: Sequence[float], kind: str) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    if kind == "timing":
        return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
    if len(set(values)) == 1:
        return f"{values[0]:,.0f}" if values[0] >= 1000 else f"{values[0]:.4g}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
