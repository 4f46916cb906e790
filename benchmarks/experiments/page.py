"""The page `docs/results.md`: what papers claim, and what was measured here, claim by claim."""

import pathlib
from collections.abc import Iterable

from benchmarks.environment import ROOT
from benchmarks.experiments.plan import Experiment
from benchmarks.experiments.running import group_by_row
from benchmarks.experiments.tables import judge
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
    sections: dict[str, list[str]] = {}
    for experiment in experiments:
        groups = None
        for comparison in experiment.comparisons:
            if not comparison.claim:
                continue
            if groups is None:
                results = Results(results_dir / f"{experiment.name}.json")
                groups = group_by_row(experiment, results)
            judgement = judge(experiment, comparison, groups)
            rows = f"{comparison.row} – {comparison.against}, {comparison.metric}"
            link = f"[{experiment.name}](../benchmarks/results/{experiment.name}.md)"
            if judgement is None:
                cells = [f"{rows}: not measured yet; {experiment.name}", "**not decidable here**"]
            else:
                measured = (
                    f"{rows}: {judgement.difference}, better in {judgement.better_in}; {link}"
                )
                cells = [measured, f"**{judgement.verdict}**: {judgement.sentence}"]
            claim = comparison.claim
            sections.setdefault(comparison.method, []).append(
                "| " + " | ".join([claim, *cells]) + " |"
            )
    parts = [_INTRODUCTION]
    for method, lines in sections.items():
        head = "| the paper says | measured here | what may be said |\n| --- | --- | --- |\n"
        parts.append(f"## {method}\n\n{head}" + "\n".join(lines) + "\n")
    return "\n".join(parts)
