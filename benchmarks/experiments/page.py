"""The page `docs/results.md`: what papers claim, and what was measured here, claim by claim."""

import pathlib
from collections.abc import Iterable

from benchmarks.environment import ROOT
from benchmarks.experiments.plan import Comparison, Experiment
from benchmarks.experiments.running import group_by_row
from benchmarks.experiments.tables import Groups, judge
from benchmarks.harness import RESULTS
from benchmarks.records import Results

PAGE = ROOT / "docs" / "results.md"

_INTRODUCTION = """\
# Claims and results

What the papers claim, in our words, and what small models on two CPU cores allow one to say of it.
`make experiments` writes this page from the records in `benchmarks/results`, verdicts included.

- A row and its rival train with equal seeds and data, with rates found on other seeds, at equal
  cost for each. Differences are those of pairs: mean ± half the interval of 95 %, each by itself.
- **Confirmed**: the whole interval is better than 0. A claim that quality is kept has a margin
  instead of 0, and an interval of 90 %; "TOST" says that it lies within the margin on both sides.
- **Not confirmed**: the whole interval is worse.
- **Not decidable here**: neither; the sentence says how many pairs would decide four times in
  five, if mean and spread are as measured. Nothing is said before all planned pairs are there.
- Nothing here says what holds at the size of the papers' models.
"""


def make_page(experiments: Iterable[Experiment], results_dir: pathlib.Path = RESULTS) -> str:
    """Make the page from what has been recorded.

    Args:
      experiments: those whose comparisons may belong to claims.
      results_dir: folder of the results.

    Returns:
      str, Markdown; a claim that has no two pairs yet says so.
    """
    sections: dict[str, dict[str, list[str]]] = {}
    for experiment in experiments:
        claims = [comparison for comparison in experiment.comparisons if comparison.claim]
        if not claims:
            continue
        groups = group_by_row(experiment, Results(results_dir / f"{experiment.name}.json"))
        for comparison in claims:
            lines = sections.setdefault(comparison.method, {}).setdefault(comparison.claim, [])
            line = _describe(experiment, comparison, groups)
            # Where nothing is measured, one line stands for all rivals.
            if line not in lines:
                lines.append(line)
    parts = [_INTRODUCTION]
    for method, claims in sections.items():
        table = "| the paper says | measured here | what may be said |\n| --- | --- | --- |\n"
        for claim, lines in claims.items():
            for index, line in enumerate(lines):
                table += f"| {'' if index else claim} | {line} |\n"
        parts.append(f"## {method}\n\n{table}")
    return "\n".join(parts)


def _describe(experiment: Experiment, comparison: Comparison, groups: Groups) -> str:
    """Return what was measured and what may be said, two cells of a line."""
    judgement = judge(experiment, comparison, groups)
    if judgement is None:
        return f"not measured yet: {experiment.name} | **not decidable here**"
    rows = f"{comparison.row} – {comparison.against}, {comparison.metric}"
    link = f"[{experiment.name}](../benchmarks/results/{experiment.name}.md)"
    measured = f"{rows}: {judgement.difference}, better in {judgement.better_in}; {link}"
    return f"{measured} | **{judgement.verdict}**: {judgement.sentence}"
