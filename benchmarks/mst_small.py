"""What does mixed sparsity training cost in quality, and what does it save, against its rivals?

    python -m benchmarks.mst_small methods
    python -m benchmarks.mst_small timing
    python -m benchmarks.mst_small patterns
    python -m benchmarks.mst_small costs

Model, data and number of steps are those of `configs/mst_small.py`. Rivals are sparse throughout:
fixed random masks, SET and RigL at the published 80 %, and RigL at about the FLOPs of MST. MST in
blocks keeps weights and attention in whole blocks, so that its ultra-sparse phase is faster and not
only cheaper on paper. Dense training has half the learning rate, the better one for it of the two.

"patterns" compares shapes of sparsity at one density, half of all weights of the layers: RigL
chooses them one by one, two of every four, or in blocks. "costs" draws what the others have
recorded: loss over FLOPs, and over the time that the phases' steps take by themselves.
"""

import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.experiments import Experiment, Setting, run_named, shorten
from benchmarks.harness import RESULTS
from benchmarks.records import Results

_CONFIG = "configs/mst_small.py"
_BLOCKS = "32x32"


def _setting(name: str, **overrides) -> Setting:
    options = {f"recipe.{name}.{key}": value for key, value in overrides.items()}
    return Setting(config=_CONFIG, overrides={"recipe.name": name, **options})


def _half(pattern: str) -> Setting:
    return _setting("rigl", sparsity=0.5, sparse_weights=f".*/.*={pattern}")


_DENSE = Setting(
    config=_CONFIG, overrides={"recipe.name": "dense", "optimizer.learning_rate": 3e-3}
)
_COLUMNS = {
    "validation loss": "validation_loss",
    "accuracy": "validation_accuracy",
    "FLOPs of dense": "training_flops_of_dense",
}
_METHODS = Experiment(
    name="mst_small",
    kind="quality",
    settings={
        "dense": _DENSE,
        "static 80 %": _setting("static"),
        "SET 80 %": _setting("set"),
        "RigL 80 %": _setting("rigl"),
        "RigL 90 %": _setting("rigl", sparsity=0.9),
        "MST": _setting("mst"),
        "MST, blocks": _setting("mst", sparse_weights=f".*={_BLOCKS}"),
    },
    seeds=(0, 1, 2),
    columns=_COLUMNS,
    curves={"validation loss": "validation_loss", "FLOPs of a step": "step_flops"},
)
_TIMED_STEPS = 100
_TIMING = Experiment(
    name="mst_small_timing",
    kind="timing",
    settings={
        name: shorten(_METHODS.settings[name], _TIMED_STEPS, optimizer__warmup_steps=10)
        for name in ("dense", "RigL 90 %", "MST", "MST, blocks")
    },
    seeds=(0, 1, 2),
    columns={
        f"{phase} step, s": f"{phase}_step_seconds"
        for phase in ("dense", "sparse", "warm-up", "ultra-sparse", "restoration")
    },
)
_PATTERNS = Experiment(
    name="mst_small_patterns",
    kind="quality",
    settings={
        "dense": _DENSE,
        "unstructured": _half("unstructured"),
        "2:4": _half("2:4"),
        f"{_BLOCKS} blocks": _half(_BLOCKS),
    },
    seeds=(0, 1, 2),
    columns=_COLUMNS,
)


def plot_costs(methods: Results, timing: Results, path: pathlib.Path) -> None:
    """Draw validation loss over FLOPs, and over time, of the means of all seeds.

    Args:
      methods: of the experiment "methods".
      timing: of "timing"; a setting that was not timed is drawn over FLOPs only.
      path: PNG file to write.
    """
    figure = Figure(figsize=(7, 8), layout="constrained")
    by_flops, by_time = figure.subplots(2, 1, sharey=True)
    timed = _group(timing)
    colors = colormaps["tab10"](range(10))
    for color, (row, runs) in zip(colors, _group(methods).items(), strict=False):
        curves = [run["curves"] for run in runs]
        steps = [step for step, _ in curves[0]["validation_loss"]]
        loss = [
            statistics.fmean(dict(c["validation_loss"])[step] for c in curves) for step in steps
        ]
        spent = dict(curves[0]["step_flops"])
        total = [sum(spent[s] for s in spent if s <= step) for step in steps]
        by_flops.plot(total, loss, "o-", ms=4, color=color, label=row)
        if row in timed:
            seconds = _time_steps(runs[0]["summary"], [run["summary"] for run in timed[row]])
            total = [sum(seconds[s] for s in spent if s <= step) for step in steps]
            by_time.plot(total, loss, "o-", ms=4, color=color, label=row)
    by_flops.set(xlabel="FLOPs", ylabel="validation loss")
    by_time.set(xlabel="seconds in steps", ylabel="validation loss")
    for panel in (by_flops, by_time):
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _time_steps(summary: dict[str, Any], timed: list[dict[str, Any]]) -> dict[int, float]:
    """Return the seconds of every step, from the phase that it belongs to."""
    suffix = "_first_step"
    begins = {k.removesuffix(suffix): v for k, v in summary.items() if k.endswith(suffix)}
    seconds = {}
    for phase, begin in sorted(begins.items(), key=lambda item: item[1]):
        median = statistics.median(run[f"{phase}_step_seconds"] for run in timed)
        seconds |= dict.fromkeys(range(begin + 1, summary["num_steps"] + 1), median)
    return seconds


def _group(results: Results) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in results.records:
        groups.setdefault(record["key"]["row"], []).append(record["values"])
    return groups


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, or draw what they recorded.

    Args:
      arguments: list with one name.

    Raises:
      SystemExit: if it names nothing.
    """
    if list(arguments) == ["costs"]:
        methods, timing = (Results(RESULTS / f"{e.name}.json") for e in (_METHODS, _TIMING))
        plot_costs(methods, timing, RESULTS / "mst_small_costs.png")
    else:
        run_named({"methods": _METHODS, "timing": _TIMING, "patterns": _PATTERNS}, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
