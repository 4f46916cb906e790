"""Does 2:4 pre-training of feed-forward layers cost quality, and what of FST matters?

    make experiments NAME=fst_small
    make experiments NAME=fst_images

"fst_small" trains the model of `configs/fst_small.py` on text, "fst_images" that of
`configs/fashion_mnist.py:weights` on images. Dense training is the control: it follows the masks
that FST would have, which leaves the training as it is, to know how fast they flip. A dense model
with feed-forward layers of half the width is a rival that is as cheap. FST and S-STE prune the
gradients of their published configs with MVUE in rows of their own. "STE" has masks along one axis,
no decay and no dense finish; "SR-STE" besides that a decay of the published rate, in the gradient
as released, and in another row FST's dense finish. Each row has a learning rate of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from benchmarks.experiments.plan import (
    Comparison,
    Experiment,
    Setting,
    Tuning,
    change,
    use_recipe,
)

_RATES = (1.5e-3, 3e-3, 6e-3)
# Where the best rate was one at an edge, the next beyond takes the place of the one farthest away.
_LOWER_RATES = (1.5e-3, 3e-3, 7.5e-4)
_MOVED_RATES: Mapping[str, Sequence[float]] = {
    "dense": _LOWER_RATES,
    "SR-STE": _LOWER_RATES,
    "SR-STE, finish": _LOWER_RATES,
}
_KEEPS = "the quality of dense training (here: within 1 % of its loss)"
_compare = functools.partial(Comparison, metric="validation loss", better="less")
_COMPARISONS = (
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
)


def _make_rows(config: str, half_width: int) -> dict[str, Setting]:
    fst = functools.partial(use_recipe, config, "fst")
    sste = functools.partial(use_recipe, config, "sste", flip_interval_steps=10)
    plain = {"dense_fraction": 0.0, "sparse_weights": "mlp/.*=2:4"}
    sr_ste = {"variant": "sr_ste", "sr_ste_decay": "gradients", "decay_rate": 2e-4}
    return {
        "dense": fst(variant="dense", decay_rate=0.0, dense_fraction=0.0),
        "half width": change(use_recipe(config, "dense"), model__mlp_dim=half_width),
        "FST": fst(),
        "FST, MVUE": fst(grad_pruning="mvue"),
        "FST, no decay": fst(decay_rate=0.0),
        "FST, no finish": fst(dense_fraction=0.0),
        "S-STE": sste(),
        "S-STE, MVUE": sste(grad_pruning="mvue"),
        "SR-STE": fst(**sr_ste, **plain),
        "SR-STE, finish": fst(**sr_ste, sparse_weights="mlp/.*=2:4"),
        "STE": fst(variant="ste", decay_rate=0.0, **plain),
    }


def _make_experiment(
    name: str,
    config: str,
    *,
    half_width: int,
    seeds: Sequence[int],
    moved_rates: Mapping[str, Sequence[float]],
) -> Experiment:
    rows = _make_rows(config, half_width)
    candidates = {
        row: tuple({"optimizer.learning_rate": rate} for rate in moved_rates.get(row, _RATES))
        for row in rows
    }
    return Experiment(
        name=name,
        kind="quality",
        settings={row: dataclasses.replace(setting, tuned=row) for row, setting in rows.items()},
        seeds=tuple(seeds),
        columns={"validation loss": "validation_loss", "accuracy": "validation_accuracy"},
        curves={"validation loss": "validation_loss", "flip rate of masks": "flip_rate"},
        tuning=Tuning(settings=rows, candidates=candidates, seeds=(100,)),
        comparisons=_COMPARISONS,
        headline="FST",
    )


FST_SMALL = _make_experiment(
    "fst_small",
    "configs/fst_small.py",
    half_width=256,
    seeds=range(10),
    moved_rates=_MOVED_RATES,
)
FST_IMAGES = _make_experiment(
    "fst_images",
    "configs/fashion_mnist.py:weights",
    half_width=128,
    seeds=range(8),
    moved_rates={},
)
