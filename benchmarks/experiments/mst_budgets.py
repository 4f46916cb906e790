"""Mixed sparsity training at other budgets of FLOPs, and for four times as many steps.

    make experiments NAME=mst_small_budgets
    make experiments NAME=mst_small_long

As "mst_small", whose tuning found the learning rates; they are not searched anew. At an eighth of
the dense FLOPs there is no RigL and no gradual magnitude without hybrid attention: attention and
what it is made of alone take a sixth. The long runs have one seed each and decide nothing: they
show whether the order of methods is that of short runs.
"""

import functools
from typing import Any

from benchmarks.experiments.costs import measure_flops
from benchmarks.experiments.mst_small import COLUMNS, CONFIG, METHODS
from benchmarks.experiments.plan import Comparison, Experiment, Setting, change, use_recipe

RATES = {
    "dense": 1e-3,
    "dense, narrow": 6e-3,
    "dense, short": 1.5e-3,
    "MST, as released": 1.2e-2,
    "MST": 1.5e-3,
    "MST, gradient": 1.5e-3,
    "MST, random": 1.5e-3,
    "MST, static": 1.5e-3,
    "RigL, mean moments": 1e-3,
    "SET": 1.5e-3,
    "static": 1.5e-3,
    "gradual magnitude": 1.2e-2,
}
"""Row of "mst_small" -> learning rate, the best in its tuning."""


def _rated(row: str, setting: Setting | None = None, **changes: object) -> Setting:
    """Return a row of "mst_small", or another setting with its rate, with more changes."""
    return change(setting or METHODS[row], optimizer__learning_rate=RATES[row], **changes)


def _narrow(width: int) -> Setting:
    return _rated("dense, narrow", model__model_dim=width, model__mlp_dim=4 * width)


def _mst(row: str, **options: float) -> Setting:
    changes: dict[str, Any] = {f"recipe__mst__{name}": x for name, x in options.items()}
    return _rated(row, **changes)


def _lengthen(row: str) -> Setting:
    """Return a row of "mst_small" with four times as many steps, validated as often."""
    num_steps = 4 * METHODS[row].overrides.get("num_steps", 1000)
    return _rated(row, num_steps=num_steps, eval_every_steps=num_steps // 10)


# The FLOPs of these, of those of dense training: 12.0 and 49.5 %.
_EIGHTH = {"sparsity": 0.945, "warmup": 0.02, "restoration": 0.04}
_HALF = {"sparsity": 0.5, "warmup": 0.02, "restoration": 0.1}
_compare = functools.partial(Comparison, metric="validation loss", better="less", method="MST")
MST_SMALL_BUDGETS = Experiment(
    name="mst_small_budgets",
    kind="quality",
    settings={
        "dense": _rated("dense"),
        "dense, narrow, an eighth": _narrow(40),
        "MST, an eighth": _mst("MST", **_EIGHTH),
        "MST, static, an eighth": _mst("MST, static", **_EIGHTH),
        "dense, narrow, a half": _narrow(88),
        "MST, a half": _mst("MST", **_HALF),
        "MST, static, a half": _mst("MST, static", **_HALF),
        "RigL, mean moments, a half": _rated(
            "RigL, mean moments",
            use_recipe(CONFIG, "rigl", sparsity=0.59, moments="mean"),
        ),
        "static, a half": _rated("static", use_recipe(CONFIG, "static_weights", sparsity=0.59)),
    },
    seeds=(0, 1, 2, 3),
    columns=COLUMNS,
    measure=measure_flops,
    comparisons=[
        *(_compare(f"MST, {budget}", "dense", margin=0.01) for budget in ("an eighth", "a half")),
        *(
            _compare(f"MST, {budget}", f"{rival}, {budget}")
            for budget in ("an eighth", "a half")
            for rival in ("dense, narrow", "MST, static")
        ),
        _compare("MST, a half", "RigL, mean moments, a half"),
        _compare("MST, a half", "static, a half"),
    ],
    headline="MST, an eighth",
)
MST_SMALL_LONG = Experiment(
    name="mst_small_long",
    kind="quality",
    settings={row: _lengthen(row) for row in RATES},
    seeds=(0,),
    columns=COLUMNS,
    measure=measure_flops,
)
