"""What does mixed sparsity training cost in quality, and what does it save, against its rivals?

    make experiments NAME=mst_small
    make experiments NAME=mst_small_timing
    make experiments NAME=mst_small_patterns

Model, data and number of steps are those of `configs/mst_small.py`. Rivals are sparse throughout:
fixed random masks, SET and RigL at the published 80 %, and RigL at the FLOPs of MST. All train with
the learning rate that suits the dense model, those of sparse weights scaled by their density. MST
in blocks keeps weights of layers in whole blocks, which its products skip, and those of the tied
embedding one by one: a token is nothing without its block.

"mst_small_patterns" compares shapes of sparsity at one density, half of all weights of the layers,
in 400 steps: RigL chooses them one by one, two of every four, or in blocks. A picture of what
"mst_small" and "mst_small_timing" have recorded draws loss over FLOPs, and over the time that the
phases' steps take by themselves.
"""

import pathlib

from benchmarks.experiments.costs import Groups, plot_costs, sum_costs
from benchmarks.experiments.plan import Experiment, Setting, shorten, use_recipe
from benchmarks.experiments.running import group_by_row
from benchmarks.records import Results

_CONFIG = "configs/mst_small.py"
_BLOCKS = "32x32"


def _half(pattern: str) -> Setting:
    return use_recipe(_CONFIG, "rigl", sparsity=0.5, sparse_weights=f".*/.*={pattern}")


_DENSE = use_recipe(_CONFIG, "dense")
_COLUMNS = {
    "validation loss": "validation_loss",
    "accuracy": "validation_accuracy",
    "FLOPs of dense": "training_flops_of_dense",
}
_METHODS = {
    "dense": _DENSE,
    "static 80 %": use_recipe(_CONFIG, "static_weights"),
    "SET 80 %": use_recipe(_CONFIG, "set"),
    "RigL 80 %": use_recipe(_CONFIG, "rigl"),
    "RigL 88 %": use_recipe(_CONFIG, "rigl", sparsity=0.88),
    "MST": use_recipe(_CONFIG, "mst"),
    "MST, blocks": use_recipe(
        _CONFIG, "mst", sparse_weights=f".*/.*={_BLOCKS}; embedding=unstructured"
    ),
}
# Phases long enough to be timed; how long they are does not change what a step of theirs takes.
_TIMED = {
    "num_steps": 100,
    "optimizer__warmup_fraction": 0.1,
    "recipe__mst__warmup": 0.2,
    "recipe__mst__restoration": 0.3,
}
MST_SMALL_TIMING = Experiment(
    name="mst_small_timing",
    kind="timing",
    settings={
        name: shorten(_METHODS[name], **_TIMED)
        for name in ("dense", "RigL 88 %", "MST", "MST, blocks")
    },
    seeds=(0, 1, 2),
    columns={
        f"{phase} step, s": f"{phase}_step_seconds"
        for phase in ("dense", "sparse", "warm-up", "ultra-sparse", "restoration")
    },
)


def _draw_costs(groups: Groups, results_dir: pathlib.Path) -> str:
    timed = Results(results_dir / f"{MST_SMALL_TIMING.name}.json")
    costs = sum_costs(groups, group_by_row(MST_SMALL_TIMING, timed))
    plot_costs(costs, results_dir / "mst_small_costs.png")
    return ""


MST_SMALL = Experiment(
    name="mst_small",
    kind="quality",
    settings=_METHODS,
    seeds=(0, 1, 2),
    columns=_COLUMNS,
    curves={"validation loss": "validation_loss", "FLOPs of a step": "step_flops"},
    report=_draw_costs,
)
MST_SMALL_PATTERNS = Experiment(
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
