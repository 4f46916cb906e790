"""Does 2:4 pre-training of feed-forward layers cost quality, and what of FST matters?

    make experiments NAME=fst_small

Model, data and number of steps are those of `configs/fst_small.py`. Dense training is the control:
it follows the masks that FST would have, which leaves the training as it is, to know how fast they
flip. A dense model with feed-forward layers of half the width is a rival that is as cheap. FST and
S-STE prune the gradients of their published configs with MVUE in rows of their own. "STE" has masks
along one axis, no decay and no dense finish; "SR-STE" besides that a decay of the published rate,
in the gradient as released, and in another row FST's dense finish. Each row has a learning rate of
its own.
"""

import dataclasses
import functools

from benchmarks.experiments.plan import Comparison, Experiment, Tuning, change, use_recipe

_CONFIG = "configs/fst_small.py"
_fst = functools.partial(use_recipe, _CONFIG, "fst")
_PLAIN = {"dense_fraction": 0.0, "sparse_weights": "mlp/.*=2:4"}
_SR_STE = {"variant": "sr_ste", "sr_ste_decay": "gradients", "decay_rate": 2e-4}
_sste = functools.partial(use_recipe, _CONFIG, "sste", flip_interval_steps=10)

_ROWS = {
    "dense": _fst(variant="dense", decay_rate=0.0, dense_fraction=0.0),
    "half width": change(use_recipe(_CONFIG, "dense"), model__mlp_dim=256),
    "FST": _fst(),
    "FST, MVUE": _fst(grad_pruning="mvue"),
    "FST, no decay": _fst(decay_rate=0.0),
    "FST, no finish": _fst(dense_fraction=0.0),
    "S-STE": _sste(),
    "S-STE, MVUE": _sste(grad_pruning="mvue"),
    "SR-STE": _fst(**_SR_STE, **_PLAIN),
    "SR-STE, finish": _fst(**_SR_STE, sparse_weights="mlp/.*=2:4"),
    "STE": _fst(variant="ste", decay_rate=0.0, **_PLAIN),
}
_RATES = tuple({"optimizer.learning_rate": rate} for rate in (1.5e-3, 3e-3, 6e-3))


_compare = functools.partial(Comparison, metric="validation loss", better="less")
_KEEPS = "the quality of dense training (here: within 1 % of its loss)"
FST_SMALL = Experiment(
    name="fst_small",
    kind="quality",
    settings={row: dataclasses.replace(setting, tuned=row) for row, setting in _ROWS.items()},
    seeds=tuple(range(10)),
    columns={
        "validation loss": "validation_loss",
        "accuracy": "validation_accuracy",
    },
    curves={"validation loss": "validation_loss", "flip rate of masks": "flip_rate"},
    tuning=Tuning(settings=_ROWS, candidates=dict.fromkeys(_ROWS, _RATES), seeds=(100, 101)),
    comparisons=[
        _compare("FST", "dense", margin=0.01, claim=_KEEPS, method="FST"),
        _compare("FST, MVUE", "dense", margin=0.01, claim=f"{_KEEPS}, with MVUE", method="FST"),
        _compare("FST", "half width", claim="better than a dense half", method="FST"),
        _compare("FST", "SR-STE", claim="better than SR-STE", method="FST"),
        _compare("FST", "SR-STE, finish", claim="better than SR-STE", method="FST"),
        _compare("FST", "FST, no decay", claim="decay on gradients helps", method="FST"),
        _compare("FST", "FST, no finish", claim="the dense finish helps", method="FST"),
        _compare("S-STE", "dense", margin=0.01, claim=_KEEPS, method="S-STE"),
        _compare("S-STE, MVUE", "dense", margin=0.01, claim=f"{_KEEPS}, MVUE", method="S-STE"),
        _compare("S-STE", "FST", claim="better than earlier 2:4 recipes", method="S-STE"),
        _compare("S-STE", "SR-STE", claim="better than earlier 2:4 recipes", method="S-STE"),
        _compare("half width", "dense", margin=0.01),
    ],
    headline="FST",
)
