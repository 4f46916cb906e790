"""Which pattern finds the blocks that attention needs, where one knows which these are?

    make experiments NAME=hidden_permutation
    make experiments NAME=fixed_lag
    make experiments NAME=associative_recall

The second half of a sequence copies the first. In "hidden_permutation" its blocks are permuted by a
permutation that all sequences share and no pattern knows: eight blocks of 256, and the diagonal
that all patterns keep, are enough for an accuracy of 1; who sees no needed block guesses one of 16
symbols. Seed s trains with permutation s mod 3. "fixed_lag" copies without permutation, along one
diagonal. In "associative_recall" each sequence has a permutation of its own, told by the first
symbol of each block, so that no fixed pattern can do with few blocks; it takes two layers. There is
nothing to compare until dense attention learns it: its rows are dense ones, of four pairs of
symbols and three rates.
"""

import pathlib
from typing import Any

import numpy as np

from benchmarks.experiments.attention_patterns import (
    make_experiment,
    measure_kept,
    unpack_kept,
)
from benchmarks.experiments.pattern_pictures import draw_kept, plot_accuracy
from benchmarks.experiments.plan import Experiment, change, use_recipe
from benchmarks.experiments.tables import Groups
from sparsejax.data.copying import draw_permutation

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.5)
_SHORT = {"eval_every_steps": 200, "checkpoint__every_steps": 400, "log_every_steps": 100}


def _set_permutation(seed: int) -> dict[str, Any]:
    return {"data.copy_permutation": seed % 3}


def measure_blocks(workdir: pathlib.Path) -> dict[str, Any]:
    """Read which blocks a run kept in the end, and how many of those that a copy needs.

    Args:
      workdir: folder of a run of `copying:hidden_permutation` or `copying:fixed_lag`, of one layer.

    Returns:
      As `measure_kept`, and "needed_kept", the share of the needed blocks that any head keeps.
    """
    from sparsejax.checkpoint.workdir import read_run

    values = measure_kept(workdir)
    if "kept" not in values:
        return values
    data = read_run(workdir).config.data
    (kept_IJ,) = unpack_kept(values["kept"])
    num_needed = len(kept_IJ) // 2
    source_I = np.arange(num_needed)
    if data.source == "copying:hidden_permutation":
        source_I = draw_permutation(num_needed, data.copy_permutation)
    needed = kept_IJ[num_needed + np.arange(num_needed), source_I]
    return {"needed_kept": float(needed.mean()), **values}


def _report(groups: Groups, results_dir: pathlib.Path) -> str:
    plot_accuracy(groups, results_dir / "hidden_permutation_accuracy.png", chance=1 / 16)
    half = 8
    source_I = draw_permutation(half, _set_permutation(0)["data.copy_permutation"])
    needed = [(half + block, source) for block, source in enumerate(source_I)]
    draw_kept(groups, results_dir / "hidden_permutation_patterns.png", needed=needed)
    return ""


_COLUMNS = {
    "accuracy": "validation_accuracy",
    "validation loss": "validation_loss",
    "needed blocks kept": "needed_kept",
    "attention density": "sparse_attention_density",
    "sparse from step": "sparse_first_step",
    "of W untrained": "untrained_share",
}
HIDDEN_PERMUTATION = make_experiment(
    "hidden_permutation",
    "configs/copying.py:hidden_permutation",
    densities=DENSITIES,
    tuning_seeds=(100, 101),
    changes=_SHORT,
    columns=_COLUMNS,
    by_seed=_set_permutation,
    measure=measure_blocks,
    report=_report,
)
FIXED_LAG = make_experiment(
    "fixed_lag",
    "configs/copying.py:fixed_lag",
    changes=_SHORT,
    columns=_COLUMNS,
    measure=measure_blocks,
)
ASSOCIATIVE_RECALL = Experiment(
    name="associative_recall",
    kind="quality",
    settings={
        f"dense, {rate:g}": change(
            use_recipe("configs/copying.py:associative_recall", "dense"),
            num_steps=4000,
            eval_every_steps=250,
            log_every_steps=500,
            checkpoint__every_steps=4000,
            data__sequence_length=16,
            data__copy_block=2,
            model__num_layers=2,
            model__model_dim=64,
            model__mlp_dim=128,
            model__positions="rotary",
            model__block_size=1,
            optimizer__schedule="wsd",
            optimizer__learning_rate=rate,
        )
        for rate in (5e-4, 1e-3, 2e-3)
    },
    seeds=(0, 1, 2, 3),
    columns={"accuracy": "validation_accuracy", "validation loss": "validation_loss"},
)
