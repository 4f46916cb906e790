"""Does 2:4 pre-training of feed-forward layers cost quality, and what of FST matters?

    make experiments NAME=fst_small

Model, data and number of steps are those of `configs/fst_small.py`. Dense training is the control:
it follows the masks that FST would have, which leaves the training as it is, to know how fast they
flip. A dense model with feed-forward layers of half the width is a rival that is as cheap. "STE"
has masks along one axis, no decay and no dense finish, and "SR-STE" a decay of its published rate
on the weights besides; "FST, no decay" is FST otherwise.
"""

from benchmarks.experiments.plan import Experiment, Setting

_CONFIG = "configs/fst_small.py"


def _fst(**overrides) -> Setting:
    return Setting(
        config=_CONFIG, overrides={f"recipe.fst.{k}": value for k, value in overrides.items()}
    )


_PLAIN = {"dense_fraction": 0.0, "sparse_weights": "mlp/.*=2:4"}

FST_SMALL = Experiment(
    name="fst_small",
    kind="quality",
    settings={
        "dense": _fst(variant="dense", decay_rate=0.0, dense_fraction=0.0),
        "FST": _fst(),
        "FST, no decay": _fst(decay_rate=0.0),
        "STE": _fst(variant="ste", decay_rate=0.0, **_PLAIN),
        "SR-STE": _fst(variant="sr_ste", decay_rate=2e-4, **_PLAIN),
        "S-STE": Setting(
            config=_CONFIG,
            overrides={"recipe.name": "sste", "recipe.sste.flip_interval_steps": 10},
        ),
        "half width": Setting(
            config=_CONFIG, overrides={"recipe.name": "dense", "model.mlp_dim": 256}
        ),
    },
    seeds=(0, 1, 2),
    columns={
        "validation loss": "validation_loss",
        "best validation loss": "best_validation_loss",
        "accuracy": "validation_accuracy",
    },
    curves={"validation loss": "validation_loss", "flip rate of masks": "flip_rate"},
)
