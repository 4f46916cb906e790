"""The rows and comparisons of experiments on attention patterns, the same on every task.

All runs are dense for the first half of their steps, so that all patterns begin with the same
weights, and keep equally many blocks afterwards. "own switch" is SPION-CF and SAT as released,
which find out themselves when to become sparse. "top-k" keeps the largest blocks of the map itself,
without SPION's convolution; "dynamic" chooses for each input.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.plan import (
    Comparison,
    Experiment,
    Setting,
    Tuning,
    change,
    static_attention,
    use_recipe,
)

MIDDLE = 0.15
"""The density at which rates are tuned and rows compared."""

DENSE = "dense"
"""The row of the control."""

_SWITCH = 0.5
_SPION = {"probe_interval_fraction": _SWITCH, "latest_switch_fraction": _SWITCH}
_SAT = {"min_skewness": 1e9, "latest_switch_fraction": _SWITCH}
_RATES = tuple({"optimizer.learning_rate": rate} for rate in (1e-3, 3e-3, 6e-3))
# Of SAT with a small start: where W begins, and how fast it moves.
_STARTS = tuple(
    {"recipe.sat.pattern_init_scale": scale, "recipe.sat.pattern_rate_scale": rate}
    for scale, rate in ((0.1, 1.0), (0.1, 10.0), (0.01, 10.0))
)
_COLUMNS = {
    "accuracy": "validation_accuracy",
    "validation loss": "validation_loss",
    "attention density": "sparse_attention_density",
    "sparse from step": "sparse_first_step",
    "of W untrained": "untrained_share",
}


def make_experiment(
    name: str,
    config: str,
    *,
    densities: Sequence[float] = (MIDDLE,),
    seeds: Sequence[int] = range(10),
    tuning_seeds: Sequence[int] = (100,),
    changes: dict[str, Any],
    **options: Any,
) -> Experiment:
    """Return the experiment that compares all patterns on a task.

    Args:
      name: of the experiment.
      config: str, path from the root of the repository.
      densities: shares of the blocks that patterns keep; one is `MIDDLE`.
      seeds: that are reported.
      tuning_seeds: with which each pattern gets its learning rate, at `MIDDLE`.
      changes: of all settings, with "__" for the dots of a key.
      **options: others of `Experiment`.
    """
    patterns = _make_patterns(config, MIDDLE)
    # As published: nothing of ours makes them switch.
    own_switch = {
        "SPION-CF": use_recipe(
            config,
            "spion",
            variant="cf",
            quantile=1 - MIDDLE,
            density=None,
            probe_interval_fraction=0.1,
            latest_switch_fraction=None,
        ),
        "SAT": use_recipe(config, "sat", density=MIDDLE),
    }
    dense = use_recipe(config, DENSE)
    rows = {DENSE: _tune(dense, DENSE)}
    for density in densities:
        for pattern, setting in _make_patterns(config, density).items():
            rows[name_row(pattern, density)] = _tune(setting, pattern)
    for pattern, setting in own_switch.items():
        rows[f"{pattern}, own switch"] = _tune(setting, pattern)
    tuned = {DENSE: dense, **patterns}
    return Experiment(
        name=name,
        kind="quality",
        settings={row: change(setting, **changes) for row, setting in rows.items()},
        seeds=tuple(seeds),
        tuning=Tuning(
            settings={row: change(setting, **changes) for row, setting in tuned.items()},
            candidates=dict.fromkeys(tuned, _RATES) | {"SAT, small start": _STARTS},
            seeds=tuple(tuning_seeds),
        ),
        comparisons=_make_comparisons(),
        headline=name_row("SPION-C", MIDDLE),
        **({"columns": _COLUMNS, "measure": measure_kept, "curves": {}} | options),
    )


def name_row(pattern: str, density: float) -> str:
    """Return the row of a pattern that keeps a share of the blocks."""
    return f"{pattern}, {density:g}"


def split_row(row: str) -> tuple[str, float] | None:
    """Return pattern and density of what `name_row` returned; None of other rows.

    Example:
      >>> split_row("SPION-C, heads, 0.15"), split_row("SAT, own switch")
      (('SPION-C, heads', 0.15), None)
    """
    pattern, _, density = row.rpartition(", ")
    return (pattern, float(density)) if density[:1].isdigit() else None


def measure_kept(workdir: pathlib.Path) -> dict[str, Any]:
    """Read which blocks a run kept in the end.

    Args:
      workdir: folder of a run that has attention patterns.

    Returns:
      "kept", of each layer the blocks that any head keeps, see `unpack_kept`; of SAT also
      "untrained_share", of the kept blocks. Empty if no mask says what is kept.
    """
    from sparsejax.tools.load import load_model

    model, config, _ = load_model(workdir)
    if config.recipe.name in ("dense", "dynamic_attention"):
        return {}
    kept_LIJ = np.asarray(model.blocks.attention.block_mask)[:, 0].any(1)
    digits = [np.packbits(kept_IJ).tobytes().hex() for kept_IJ in kept_LIJ]
    values: dict[str, Any] = {"kept": " ".join(digits)}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        if share := json.loads(line).get("phase_metrics", {}).get("untrained_share"):
            values["untrained_share"] = float(np.mean(share))
    return values


def unpack_kept(kept: str) -> np.ndarray:
    """Return the blocks of each layer that a record keeps.

    Args:
      kept: hexadecimal digits of the bits, row by row, a word for each layer.

    Returns:
      bool[L, I, I].
    """
    layers = []
    for word in kept.split():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(word), np.uint8))
        side = math.isqrt(len(bits))
        layers.append(bits[: side**2].reshape(side, side).astype(bool))
    return np.stack(layers)


def _tune(setting: Setting, pattern: str) -> Setting:
    return dataclasses.replace(setting, tuned=pattern)


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


_compare = functools.partial(Comparison, metric="accuracy", better="more")


def _claim(pattern: str, claim: str) -> dict[str, Any]:
    """Return claim and method of a published pattern; nothing of those that are ours."""
    method = {"SPION-CF": "SPION", "SAT": "SAT"}.get(pattern)
    return {"claim": claim, "method": method} if method else {}


_FIXED = ("random", "sliding window", "Longformer", "BigBird")
_OURS = ("SPION-C, heads", "dynamic")
_LEARNED = ("SPION-CF", "SPION-C", "SPION-F", "top-k", "SAT", "SAT, small start")


def _make_comparisons() -> list[Comparison]:
    rows = {name: name_row(name, MIDDLE) for name in (*_LEARNED, *_FIXED, *_OURS)}
    fixed = "better quality than sparse attention with fixed patterns"
    dense = "the quality of dense attention (here: within 1 %)"
    best = "convolution and flood fill together choose best"
    comparisons = [
        _compare(rows[learned], rows[other], **_claim(learned, fixed))
        for learned in _LEARNED
        for other in _FIXED
    ]
    comparisons += [
        _compare(rows[learned], DENSE, margin=0.01, **_claim(learned, dense))
        for learned in (*_LEARNED, *_OURS)
    ]
    comparisons += [
        _compare(rows["SPION-CF"], rows[variant], **_claim("SPION-CF", best))
        for variant in ("SPION-C", "SPION-F")
    ]
    ours = {"SPION-C": "top-k", "SAT": "SPION-CF", "SAT, small start": "SAT"}
    ours |= dict.fromkeys(_OURS, "SPION-C")
    return comparisons + [_compare(rows[row], rows[other]) for row, other in ours.items()]
