"""Which pattern finds the blocks that attention needs, where one knows which these are?

    make experiments NAME=hidden_permutation

The second half of a sequence copies the first, its blocks permuted by a permutation that all
sequences share and no pattern knows. Eight blocks of 256, and the diagonal that all patterns keep,
are enough for an accuracy of 1; who sees no needed block guesses one of 16 symbols. All runs are
dense for the first half of their steps, so that all patterns begin with the same weights, and keep
equally many blocks afterwards. "own switch" is SPION-CF and SAT as released, which find out
themselves when to become sparse. Seed s trains with permutation s mod 3.

"fixed_lag" copies without permutation, along one diagonal. In "associative_recall" each sequence
has a permutation of its own, told by the first symbol of each block.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.experiments.paired import describe_mean
from benchmarks.experiments.plan import (
    Comparison,
    Experiment,
    Setting,
    Tuning,
    change,
    static_attention,
    use_recipe,
)
from sparsejax.data.copying import draw_permutation
from sparsejax.report.plots.style import BLUE, GREEN, ORANGE

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.5)
_MIDDLE = 0.15
_DENSE = "dense"
_SHORT = {"eval_every_steps": 200, "checkpoint__every_steps": 400, "log_every_steps": 100}
_SWITCH = 0.5
_SPION = {"probe_interval_fraction": _SWITCH, "latest_switch_fraction": _SWITCH}
_SAT = {"min_skewness": 1e9, "latest_switch_fraction": _SWITCH}
_RATES = tuple({"optimizer.learning_rate": rate} for rate in (1e-3, 3e-3, 6e-3))
# Of SAT with a small start: where W begins, and how fast it moves.
_STARTS = tuple(
    {"recipe.sat.pattern_init_scale": scale, "recipe.sat.pattern_rate_scale": rate}
    for scale, rate in ((0.1, 1.0), (0.1, 10.0), (0.01, 10.0))
)


def _make_patterns(config: str, density: float) -> dict[str, Setting]:
    """Return the settings that keep a share of the blocks, by name."""
    use = functools.partial(use_recipe, config)
    fixed = functools.partial(static_attention, config, density=density, dense_fraction=_SWITCH)
    flood = {"density": density, **_SPION}
    return {
        "SPION-CF": use("spion", variant="cf", **flood),
        "SPION-C": use("spion", variant="c", **flood),
        # The filter of the config is not for "f", which has none.
        "SPION-F": use("spion", variant="f", filter_size=31, **flood),
        "SPION-C, heads": use("spion", variant="c", per_head=True, **flood),
        "top-k": use("spion", variant="c", filter_size=1, **flood),
        "SAT": use("sat", density=density, **_SAT),
        "SAT, small start": use("sat", density=density, **_SAT),
        "dynamic": use("dynamic_attention", density=density, num_sinks=0, dense_fraction=_SWITCH),
        "random": fixed("random"),
        "sliding window": fixed("sliding_window"),
        "Longformer": fixed("longformer"),
        "BigBird": fixed("bigbird"),
    }


def _name(pattern: str, density: float) -> str:
    return f"{pattern}, {density:g}"


def _set_permutation(seed: int) -> dict[str, Any]:
    return {"data.copy_permutation": seed % 3}


def measure_blocks(workdir: pathlib.Path) -> dict[str, Any]:
    """Read which blocks a run kept in the end, and how many of those that a copy needs.

    Args:
      workdir: folder of a run of `copying:hidden_permutation` or `copying:fixed_lag`.

    Returns:
      "needed_kept", the share of the needed blocks that any head keeps; "kept", the blocks that
      any head keeps, as hexadecimal digits of their bits, row by row; of SAT also
      "untrained_share", of the kept blocks. Empty if no mask says what is kept.
    """
    from sparsejax.tools.load import load_model

    model, config, _ = load_model(workdir)
    if config.recipe.name in ("dense", "dynamic_attention"):
        return {}
    (kept_NIJ,) = np.asarray(model.blocks.attention.block_mask)[:, 0]
    kept_IJ = kept_NIJ.any(0)
    num_needed = len(kept_IJ) // 2
    source_I = np.arange(num_needed)
    if config.data.source == "copying:hidden_permutation":
        source_I = draw_permutation(num_needed, config.data.copy_permutation)
    needed = kept_IJ[num_needed + np.arange(num_needed), source_I]
    values = {"needed_kept": float(needed.mean()), "kept": np.packbits(kept_IJ).tobytes().hex()}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        if share := json.loads(line).get("phase_metrics", {}).get("untrained_share"):
            values["untrained_share"] = float(np.mean(share))
    return values


def plot_accuracy(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Draw accuracy over density, a line for each pattern with the interval of 95 % of its mean.

    Args:
      groups: records by row.
      path: PNG file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    patterns = dict.fromkeys(row.rpartition(", ")[0] for row in groups if _is_swept(row))
    for index, pattern in enumerate(patterns):
        points = []
        for density in DENSITIES:
            if records := groups.get(_name(pattern, density)):
                values = [r["values"]["summary"]["validation_accuracy"] for r in records]
                points.append((density, *describe_mean(values)))
        if not points:
            continue
        x, mean, half_width = zip(*points, strict=True)
        line = axes.errorbar(x, mean, half_width, marker="o", ms=4, capsize=3, label=pattern)
        line.lines[0].set_linestyle("-" if index < 10 else "--")
    axes.axhline(1 / 16, color="grey", lw=0.8, ls=":", label="chance")
    axes.set(xlabel="share of the blocks that are kept", ylabel="accuracy", ylim=(0, 1.04))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_kept(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Draw which blocks each pattern keeps in the first seed, and which of them are needed.

    Args:
      groups: records by row, of patterns at the middle density.
      path: PNG file to write.
    """
    kept = {}
    for row, records in groups.items():
        bits = records[0]["values"]["summary"].get("kept")
        if bits and row.endswith(f", {_MIDDLE:g}"):
            blocks = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))
            kept[row.rpartition(", ")[0]] = blocks.reshape(math.isqrt(len(blocks)), -1)
    if not kept:
        return
    half = len(next(iter(kept.values()))) // 2
    needed = list(enumerate(draw_permutation(half, _set_permutation(0)["data.copy_permutation"])))
    columns = math.ceil(len(kept) / 2)
    figure = Figure(figsize=(2.1 * columns, 4.9), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (pattern, blocks) in zip(panels, kept.items(), strict=False):
        found = sum(blocks[half + i, j] for i, j in needed)
        panel.imshow(blocks, cmap=ListedColormap(["#F2F2F2", BLUE]), vmin=0, vmax=1)
        panel.set_title(f"{pattern}\n{found} of {half} needed", fontsize=9)
        for i, j in needed:
            color = GREEN if blocks[half + i, j] else ORANGE
            corner = (j - 0.5, half + i - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, ec=color, lw=1.6))
    figure.savefig(path, dpi=150)


def _report(groups: Mapping[str, Sequence[Mapping[str, Any]]], results_dir: pathlib.Path) -> str:
    plot_accuracy(groups, results_dir / "hidden_permutation_accuracy.png")
    draw_kept(groups, results_dir / "hidden_permutation_patterns.png")
    return ""


def _is_swept(row: str) -> bool:
    return row != _DENSE and "own switch" not in row


_COLUMNS = {
    "accuracy": "validation_accuracy",
    "validation loss": "validation_loss",
    "needed blocks kept": "needed_kept",
    "attention density": "sparse_attention_density",
    "sparse from step": "sparse_first_step",
    "of W untrained": "untrained_share",
}


def _make_tuning(config: str, density: float) -> Tuning:
    """Return how each pattern gets its learning rate, at one density for all."""
    settings = {_DENSE: use_recipe(config, _DENSE), **_make_patterns(config, density)}
    candidates = dict.fromkeys(settings, _RATES) | {"SAT, small start": _STARTS}
    settings = {name: change(setting, **_SHORT) for name, setting in settings.items()}
    return Tuning(settings=settings, candidates=candidates, seeds=(100, 101))


def _make_rows(config: str, densities: Sequence[float]) -> dict[str, Setting]:
    rows = {_DENSE: dataclasses.replace(use_recipe(config, _DENSE), tuned=_DENSE)}
    for density in densities:
        for pattern, setting in _make_patterns(config, density).items():
            rows[_name(pattern, density)] = dataclasses.replace(setting, tuned=pattern)
    return {name: change(setting, **_SHORT) for name, setting in rows.items()}


_compare = functools.partial(Comparison, metric="accuracy", better="more")


def _claim(pattern: str, claim: str) -> dict[str, Any]:
    """Return claim and method of a published pattern; nothing of those that are ours."""
    method = {"SPION-CF": "SPION", "SAT": "SAT"}.get(pattern)
    return {"claim": claim, "method": method} if method else {}


_FIXED = ("random", "sliding window", "Longformer", "BigBird")
_OURS = ("SPION-C, heads", "dynamic")
_LEARNED = ("SPION-CF", "SPION-C", "SPION-F", "top-k", "SAT", "SAT, small start")


def _make_comparisons() -> list[Comparison]:
    rows = {name: _name(name, _MIDDLE) for name in (*_LEARNED, *_FIXED, *_OURS)}
    fixed = "better quality than sparse attention with fixed patterns"
    dense = "the quality of dense attention (here: within 1 %)"
    best = "convolution and flood fill together choose best"
    comparisons = [
        _compare(rows[learned], rows[other], **_claim(learned, fixed))
        for learned in _LEARNED
        for other in _FIXED
    ]
    comparisons += [
        _compare(rows[learned], _DENSE, margin=0.01, **_claim(learned, dense))
        for learned in _LEARNED
    ]
    comparisons += [
        _compare(rows["SPION-CF"], rows[variant], **_claim("SPION-CF", best))
        for variant in ("SPION-C", "SPION-F")
    ]
    ours = {"SPION-C": "top-k", "SAT": "SPION-CF", "SAT, small start": "SAT"}
    ours |= dict.fromkeys(_OURS, "SPION-C")
    return comparisons + [_compare(rows[row], rows[other]) for row, other in ours.items()]


def _make_experiment(task: str, densities: Sequence[float], **options: Any) -> Experiment:
    config = f"configs/copying.py:{task}"
    rows = _make_rows(config, densities)
    spion_cf = use_recipe(
        config,
        "spion",
        variant="cf",
        quantile=1 - _MIDDLE,
        density=None,
        probe_interval_fraction=0.1,
        latest_switch_fraction=None,
    )
    for pattern, setting in (
        ("SPION-CF", spion_cf),
        ("SAT", use_recipe(config, "sat", density=_MIDDLE)),
    ):
        released = dataclasses.replace(change(setting, **_SHORT), tuned=pattern)
        rows[f"{pattern}, own switch"] = released
    return Experiment(
        name=task,
        kind="quality",
        settings=rows,
        seeds=tuple(range(10)),
        columns=_COLUMNS,
        curves={},
        tuning=_make_tuning(config, _MIDDLE),
        by_seed=_set_permutation,
        measure=measure_blocks,
        comparisons=_make_comparisons(),
        headline=_name("SPION-C", _MIDDLE),
        **options,
    )


HIDDEN_PERMUTATION = _make_experiment("hidden_permutation", DENSITIES, report=_report)
FIXED_LAG = _make_experiment("fixed_lag", (_MIDDLE,))
