"""Tables, curves and sentences of an experiment, made from what has been recorded."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.experiments.paired import (
    Gain,
    Verdict,
    compare_pairs,
    count_pairs,
    is_equivalent,
    judge_better,
    judge_no_worse,
)
from benchmarks.experiments.plan import Comparison, Experiment
from benchmarks.experiments.running import choose_candidates, group_by_row
from benchmarks.records import Results

type Groups = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records by row, as `group_by_row` returns them."""


class Judgement(NamedTuple):
    """What the records allow one to say of a comparison.

    Attributes:
      difference: str, the row minus the other, with the interval of 95 %.
      better_in: str, in how many pairs the row was better.
      sentence: str, the verdict in words, and what would decide where nothing does.
      verdict: of the claim that the row is better, or no worse than the margin.
    """

    difference: str
    better_in: str
    sentence: str
    verdict: Verdict


def write_report(experiment: Experiment, results: Results, results_dir: pathlib.Path) -> None:
    """Write `<name>.md` and, if there are curves, `<name>.png`.

    Args:
      experiment: names rows, columns and comparisons.
      results: what has been run.
      results_dir: folder of the results.
    """
    groups = group_by_row(experiment, results)
    if not groups:
        return
    parts = [make_experiment_table(experiment, results)]
    if experiment.comparisons:
        parts.append(make_comparison_table(experiment, groups))
    if experiment.report is not None:
        parts.append(experiment.report(groups, results_dir))
    (results_dir / f"{experiment.name}.md").write_text("\n".join(part for part in parts if part))
    plot_curves(experiment, groups, results_dir / f"{experiment.name}.png")


def make_experiment_table(experiment: Experiment, results: Results) -> str:
    """Make the Markdown table of an experiment, one line per setting.

    Args:
      experiment: names rows and columns.
      results: what has been run; rows without a run are left out.

    Returns:
      str; cells are mean ± standard deviation over seeds, for timing the median over the runs
      and their range.
    """
    groups = group_by_row(experiment, results)
    best = {} if experiment.tuning is None or not groups else choose_candidates(experiment, results)
    lines = [["setting", "runs", *experiment.columns]]
    lines[0] += ["tuned"] if best else []
    for row, records in groups.items():
        summaries = [record["values"]["summary"] for record in records]
        cells = [
            _aggregate([summary[key] for summary in summaries if key in summary], experiment.kind)
            for key in experiment.columns.values()
        ]
        if best:
            chosen = best.get(experiment.settings[row].tuned or "", {})
            cells.append(", ".join(f"{k.split('.')[-1]} {v}" for k, v in chosen.items()) or "–")
        lines.append([row, str(len(records)), *cells])
    return f"{_make_caption(experiment, results, groups)}\n\n{_draw_table(lines)}"


def make_comparison_table(experiment: Experiment, groups: Groups) -> str:
    """Make the Markdown table of an experiment's comparisons, one line each.

    Args:
      groups: records by row; comparisons that have fewer than two pairs are left out.
    """
    lines = [["pairs", "of", "difference, 95 %", "better in", "what may be said"]]
    for comparison in experiment.comparisons:
        judgement = judge(experiment, comparison, groups)
        if judgement is None:
            continue
        rows = f"{comparison.row} – {comparison.against}"
        lines.append([rows, comparison.metric, *judgement[:3]])
    return _draw_table(lines) if len(lines) > 1 else ""


def judge(experiment: Experiment, comparison: Comparison, groups: Groups) -> Judgement | None:
    """Judge a comparison by the seeds that both of its rows were trained with, once all were.

    Returns:
      Judgement; None if there are fewer than two pairs.
    """
    key = experiment.columns[comparison.metric]
    by_seed = [
        {r["key"]["seed"]: r["values"]["summary"][key] for r in groups.get(name, ())}
        for name in (comparison.row, comparison.against)
    ]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if len(seeds) < 2:
        return None
    values, against = ([row[seed] for seed in seeds] for row in by_seed)
    gain = compare_pairs(values, against, comparison.better)
    sign = 1 if comparison.better == "more" else -1
    difference = f"{_signed(sign * gain.mean)} ± {_round(gain.half_width())}"
    better_in = f"{gain.num_better} of {gain.num_pairs}"
    if len(seeds) < len(experiment.seeds):
        # Whoever looks at every new pair finds something sooner or later.
        verdict = "not decidable here"
        sentence = f"{len(seeds)} of {len(experiment.seeds)} pairs so far, nothing is said before"
    elif comparison.margin is None:
        verdict, sentence = _say_better(comparison, gain)
    else:
        verdict, sentence = _say_no_worse(comparison, gain, statistics.fmean(against))
    return Judgement(difference, better_in, sentence, verdict)


def compare_runs(
    experiment: Experiment, recorded: Mapping[str, Any], again: Mapping[str, Any]
) -> tuple[str, bool]:
    """Compare a run with its record, to the digits that tables print.

    Returns:
      What to print, a line for each column, and whether all is equal or the devices differ, between
      which digits may.
    """
    devices = [run["environment"]["device"] for run in (recorded, again)]
    lines = [f"{'':24} {'recorded':>12} {'again':>12}   {recorded['key']['row']}"]
    all_equal = True
    for title, key in experiment.columns.items():
        cells = [
            _aggregate([run["values"]["summary"][key]], experiment.kind)
            if key in run["values"]["summary"]
            else "–"
            for run in (recorded, again)
        ]
        all_equal &= cells[0] == cells[1]
        note = "" if cells[0] == cells[1] else "   differs"
        lines.append(f"{title:24} {cells[0]:>12} {cells[1]:>12}{note}")
    if devices[0] != devices[1]:
        lines.append(f"recorded on {devices[0]}, now {devices[1]}: digits may differ")
    return "\n".join(lines), all_equal or devices[0] != devices[1]


def choose_style(index: int) -> dict[str, str]:
    """Choose how the line of a row is drawn.

    Args:
      index: int, of the row.

    Returns:
      dict, options of matplotlib: one of ten colours, dashed for the next ten rows.
    """
    return {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10 % 2]}


def plot_curves(experiment: Experiment, groups: Groups, path: pathlib.Path) -> None:
    """Draw curves over steps: mean over seeds, shaded from least to most.

    Args:
      experiment: names the panels.
      groups: records by row.
      path: the PNG to write.
    """
    if not experiment.curves:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4 * len(experiment.curves)), layout="constrained")
    figure.suptitle(experiment.name)
    panels = figure.subplots(len(experiment.curves), 1, squeeze=False)[:, 0]
    for (title, metric), axes in zip(experiment.curves.items(), panels, strict=True):
        axes.set(xlabel="step", ylabel=title)
        for index, (row, records) in enumerate(groups.items()):
            # A row without the metric keeps its colour free, so that panels agree.
            style = choose_style(index)
            curves = [dict(map(tuple, record["values"]["curves"][metric])) for record in records]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            values = [[curve[step] for curve in curves] for step in steps]
            axes.plot(steps, [statistics.fmean(v) for v in values], label=row, **style)
            lowest, highest = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    FigureCanvasAgg(figure).print_png(str(path))


def _say_better(comparison: Comparison, gain: Gain) -> tuple[Verdict, str]:
    verdict = judge_better(gain)
    rows = f"{comparison.row} has {{}} {comparison.metric} than {comparison.against}"
    words = ("more", "less") if comparison.better == "more" else ("less", "more")
    if verdict == "confirmed":
        return verdict, rows.format(words[0])
    if verdict == "not confirmed":
        return verdict, rows.format(words[1])
    if _round(abs(gain.mean)) == _round(gain.half_width()) == _round(0):
        return verdict, "equal in the digits shown"
    return verdict, f"cannot be told apart; {_say_pairs(count_pairs(gain))} so large a difference"


def _say_no_worse(comparison: Comparison, gain: Gain, base: float) -> tuple[Verdict, str]:
    share = comparison.margin
    assert share is not None
    margin = share * abs(base)
    verdict = judge_no_worse(gain, margin)
    low, high = (100 * (-gain.mean + sign * gain.half_width(0.9)) / base for sign in (-1, 1))
    interval = f"{low:+.1f} % to {high:+.1f} % worse, 90 %"
    percent = f"{100 * share:g} %"
    if verdict == "confirmed" and is_equivalent(gain, margin):
        return verdict, f"within {percent} of {comparison.against} (TOST; {interval})"
    if verdict == "confirmed":
        return verdict, f"no more than {percent} worse than {comparison.against} ({interval})"
    if verdict == "not confirmed":
        return verdict, f"more than {percent} worse than {comparison.against} ({interval})"
    pairs = _say_pairs(count_pairs(gain, margin))
    return verdict, f"on either side of {percent} ({interval}); {pairs} which"


def _say_pairs(count: int | None) -> str:
    return "10,000 pairs would not tell" if count is None else f"{count:,} pairs would tell"


def _make_caption(experiment: Experiment, results: Results, groups: Groups) -> str:
    title = "quality" if experiment.kind == "quality" else "speed"
    records = [record for group in groups.values() for record in group]
    dates: dict[str, set[str]] = {}
    for record in records:
        environment = record["environment"]
        device = environment["device"].replace(", 1 cores", ", 1 core")
        machine = f"{device}, jax {environment['jax']}"
        dates.setdefault(machine, set()).add(environment["date"][:10])
    machines = [
        f"{machine}, {min(days)}" + (f" to {max(days)}" if len(days) > 1 else "")
        for machine, days in sorted(dates.items())
    ]
    caption = f"**{experiment.name}** ({title}): {'; '.join(machines)}"
    seconds = [r["values"]["seconds"] for r in results.records if "seconds" in r["values"]]
    if seconds:
        caption += f"; {sum(seconds) / 3600:.1f} hours of one core"
    if experiment.tuning is not None:
        counts = {len(candidates) for candidates in experiment.tuning.candidates.values()}
        seeds = ", ".join(map(str, experiment.tuning.seeds))
        caption += f"; tuned with {max(counts)} candidates each on seeds {seeds}, not reported"
    return caption


def _draw_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *body))


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


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _round(value: float) -> str:
    return f"{value:.4f}"
