"""What the runs of an experiment have spent when they are validated, in FLOPs and in time."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.experiments.tables import Groups, choose_style


class Costs(NamedTuple):
    """What the runs of one setting had spent when they were validated, and their mean loss.

    Attributes:
      seconds: list of float, in steps; None if the setting was not timed.
    """

    loss: list[float]
    flops: list[float]
    seconds: list[float] | None


def measure_flops(workdir: pathlib.Path) -> dict[str, list[list[float]]]:
    """Add up what a run has computed whenever it is validated.

    Args:
      workdir: folder of a finished run.

    Returns:
      dict of "spent_flops", pairs of a step and the FLOPs of all steps up to it.
    """
    total, spent = 0.0, []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            total += row["step_flops"]
        elif row["kind"] == "validation":
            spent.append([row["step"], total])
    return {"spent_flops": spent}


def sum_costs(methods: Groups, timing: Groups) -> dict[str, Costs]:
    """Add up what every setting spends.

    Args:
      methods: runs with the curve "validation_loss" and what `measure_flops` returns.
      timing: timed runs of some of the settings. Each step takes the median over these runs of its
        phase's steps.

    Returns:
      dict, setting -> Costs.
    """
    costs = {}
    for row, records in methods.items():
        runs = [record["values"] for record in records]
        losses = [dict(map(tuple, run["curves"]["validation_loss"])) for run in runs]
        flops = dict(map(tuple, runs[0]["summary"]["spent_flops"]))
        seconds = None
        if row in timing:
            timed = [record["values"]["summary"] for record in timing[row]]
            steps = _time_steps(runs[0]["summary"], timed)
            seconds = [sum(x for step, x in steps.items() if step <= end) for end in losses[0]]
        loss = [statistics.fmean(run[step] for run in losses) for step in losses[0]]
        costs[row] = Costs(loss, [flops[step] for step in losses[0]], seconds)
    return costs


def plot_costs(costs: Mapping[str, Costs], path: pathlib.Path) -> None:
    """Draw validation loss over FLOPs, and over time if a setting was timed.

    Args:
      costs: what `sum_costs` returned; a setting that was not timed is drawn over FLOPs only.
      path: PNG file to write.
    """
    spent: dict[str, list[Any]] = {"FLOPs": [cost.flops for cost in costs.values()]}
    if any(cost.seconds for cost in costs.values()):
        spent["seconds in steps"] = [cost.seconds for cost in costs.values()]
    figure = Figure(figsize=(8.5, 4.5 * len(spent)), layout="constrained")
    panels = figure.subplots(len(spent), 1, sharey=True, squeeze=False)[:, 0]
    for panel, (label, rows) in zip(panels, spent.items(), strict=True):
        for index, (row, cost) in enumerate(costs.items()):
            if rows[index] is not None:
                style = choose_style(index)
                panel.plot(rows[index], cost.loss, marker="o", ms=4, label=row, **style)
        panel.set(xlabel=label, ylabel="validation loss")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
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
