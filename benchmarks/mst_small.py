"""What does mixed sparsity training cost in quality, and what does it save, against its rivals?

    python -m benchmarks.mst_small methods
    python -m benchmarks.mst_small timing
    python -m benchmarks.mst_small patterns
    python -m benchmarks.mst_small costs

Model, data and number of steps are those of `configs/mst_small.py`. Rivals are sparse throughout:
fixed random masks, SET and RigL at the published 80 %, and RigL at the FLOPs of MST. All train with
the learning rate that suits the dense model, those of sparse weights scaled by their density. MST
in blocks keeps weights of layers in whole blocks, which its products skip, and those of the tied
embedding one by one: a token is nothing without its block.

"patterns" compares shapes of sparsity at one density, half of all weights of the layers, in 400
steps: RigL chooses them one by one, two of every four, or in blocks. "costs" draws what "methods"
and "timing" have recorded: loss over FLOPs, and over the time that the phases' steps take by
themselves.
"""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


_DENSE = Setting(config=_CONFIG, overrides={"recipe.name": "dense"})
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
        "static 80 %": _setting("static_weights"),
        "SET 80 %": _setting("set"),
        "RigL 80 %": _setting("rigl"),
        "RigL 88 %": _setting("rigl", sparsity=0.88),
        "MST": _setting("mst"),
        "MST, blocks": _setting("mst", sparse_weights=f".*/.*={_BLOCKS}; embedding=unstructured"),
    },
    seeds=(0, 1, 2),
    columns=_COLUMNS,
    curves={"validation loss": "validation_loss", "FLOPs of a step": "step_flops"},
)
# Phases long enough to be timed; how long they are does not change what a step of theirs takes.
_TIMED = {
    "num_steps": 100,
    "optimizer__warmup_fraction": 0.1,
    "recipe__mst__warmup": 0.2,
    "recipe__mst__restoration": 0.3,
}
_TIMING = Experiment(
    name="mst_small_timing",
    kind="timing",
    settings={
        name: shorten(_METHODS.settings[name], **_TIMED)
        for name in ("dense", "RigL 88 %", "MST", "MST, blocks")
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
        name: shorten(setting, 400)
        for name, setting in {
            "dense": _DENSE,
            "unstructured": _half("unstructured"),
            "2:4": _half("2:4"),
            f"{_BLOCKS} blocks": _half(_BLOCKS),
        }.items()
    },
    seeds=(0, 1, 2),
    columns=_COLUMNS,
)


class Costs(NamedTuple):
    """What the runs of one setting had spent when they were validated, and their mean loss.

    Attributes:
      seconds: list of float, in steps; None if the setting was not timed.
    """

    loss: list[float]
    flops: list[float]
    seconds: list[float] | None


def sum_costs(methods: Sequence[Mapping], timing: Sequence[Mapping]) -> dict[str, Costs]:
    """Add up what every setting spends.

    Args:
      methods: records of the experiment "methods".
      timing: records of "timing". Each step takes the median over the runs of its phase's steps.

    Returns:
      dict, setting -> Costs.
    """
    timed, costs = _group(timing), {}
    for row, runs in _group(methods).items():
        losses = [dict(map(tuple, run["curves"]["validation_loss"])) for run in runs]
        flops = dict(map(tuple, runs[0]["curves"]["step_flops"]))
        seconds = None
        if row in timed:
            seconds = _time_steps(runs[0]["summary"], [run["summary"] for run in timed[row]])
        spent = [
            [sum(x for step, x in each.items() if step <= end) for end in losses[0]]
            for each in (flops, seconds or {})
        ]
        loss = [statistics.fmean(run[step] for run in losses) for step in losses[0]]
        costs[row] = Costs(loss, spent[0], spent[1] if seconds else None)
    return costs


def plot_costs(costs: Mapping[str, Costs], path: pathlib.Path) -> None:
    """Draw validation loss over FLOPs, and over time.

    Args:
      costs: what `sum_costs` returned; a setting that was not timed is drawn over FLOPs only.
      path: PNG file to write.
    """
    figure = Figure(figsize=(7, 8), layout="constrained")
    by_flops, by_time = figure.subplots(2, 1, sharey=True)
    for index, (row, spent) in enumerate(costs.items()):
        style = {"marker": "o", "ms": 4, "color": f"C{index}", "label": row}
        by_flops.plot(spent.flops, spent.loss, **style)
        if spent.seconds is not None:
            by_time.plot(spent.seconds, spent.loss, **style)
    by_flops.set(xlabel="FLOPs", ylabel="validation loss")
    by_time.set(xlabel="seconds in steps", ylabel="validation loss")
    for panel in (by_flops, by_time):
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _time_steps(summary: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the seconds of every step, from the phase that it belongs to."""
    suffix = "_first_step"
    begins = {k.removesuffix(suffix): v for k, v in summary.items() if k.endswith(suffix)}
    seconds: dict[int, float] = {}
    for phase, begin in sorted(begins.items(), key=lambda item: item[1]):
        median = statistics.median(float(run[f"{phase}_step_seconds"]) for run in timed)
        seconds |= dict.fromkeys(range(begin + 1, summary["num_steps"] + 1), median)
    return seconds


def _group(records: Sequence[Mapping]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
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
        records = (Results(RESULTS / f"{e.name}.json").records for e in (_METHODS, _TIMING))
        plot_costs(sum_costs(*records), RESULTS / "mst_small_costs.png")
    else:
        run_named({"methods": _METHODS, "timing": _TIMING, "patterns": _PATTERNS}, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
