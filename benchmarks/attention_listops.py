"""Which sparse attention keeps the accuracy of dense attention on ListOps?

    python -m benchmarks.attention_listops quality
    python -m benchmarks.attention_listops timing

Model, data and number of steps are those of `configs/sat_quickstart.py`: sequences of 21 to 199
symbols, which two CPU cores can train on; the published task has up to 2000. All patterns keep the
share of blocks that SAT keeps, fixed ones from the first step on. SPION probes every 50 steps, SAT
in every step as published; both switch at half of the run at the latest (ours: in so short a run
their own conditions may not come).
"""

import sys

from benchmarks.experiments import Experiment, Setting, run_named, shorten, static_attention

_CONFIG = "configs/sat_quickstart.py"
_DENSITY = 0.15
_LATEST = 0.5


def _setting(name: str, **overrides) -> Setting:
    options = {f"recipe.{name}.{key}": value for key, value in overrides.items()}
    return Setting(config=_CONFIG, overrides={"recipe.name": name, **options})


_SPION = {"filter_size": 15, "probe_interval_fraction": 1 / 12, "latest_switch_fraction": _LATEST}

_QUALITY = Experiment(
    name="attention_listops",
    kind="quality",
    settings={
        "dense": Setting(config=_CONFIG, overrides={"recipe.name": "dense"}),
        "SPION-CF": _setting("spion", quantile=0.85, **_SPION),
        "SPION-C": _setting("spion", variant="c", density=0.2, **_SPION),
        "SAT": _setting("sat", latest_switch_fraction=_LATEST),
        "sliding window": static_attention(_CONFIG, "sliding_window", _DENSITY),
        "Longformer": static_attention(_CONFIG, "longformer", _DENSITY),
        "BigBird": static_attention(_CONFIG, "bigbird", _DENSITY),
    },
    seeds=(0, 1, 2),
    columns={
        "accuracy": "validation_accuracy",
        "validation loss": "validation_loss",
        "attention density": "sparse_attention_density",
        "sparse from step": "sparse_first_step",
        "dense step, bytes": "dense_step_memory_bytes",
        "sparse step, bytes": "sparse_step_memory_bytes",
        "FLOPs of dense": "training_flops_of_dense",
    },
)
_TIMED_STEPS = 80
_SWITCH = 0.5
_TIMING = Experiment(
    name="attention_listops_timing",
    kind="timing",
    settings={
        "dense, jax.nn": shorten(_QUALITY.settings["dense"], _TIMED_STEPS),
        "dense, own loop": shorten(static_attention(_CONFIG, "sliding_window", 1.0), _TIMED_STEPS),
        "SPION-CF": shorten(
            _QUALITY.settings["SPION-CF"],
            _TIMED_STEPS,
            recipe__spion__probe_interval_fraction=_SWITCH,
            recipe__spion__latest_switch_fraction=_SWITCH,
        ),
        "SAT": shorten(
            _QUALITY.settings["SAT"],
            _TIMED_STEPS,
            recipe__sat__latest_switch_fraction=_SWITCH,
            recipe__sat__min_skewness=1e9,
        ),
        **{
            name: shorten(_QUALITY.settings[name], _TIMED_STEPS)
            for name in ("sliding window", "Longformer", "BigBird")
        },
    },
    seeds=(0, 1, 2),
    columns={
        "dense step, s": "dense_step_seconds",
        "sparse step, s": "sparse_step_seconds",
        "attention density": "sparse_attention_density",
    },
)

if __name__ == "__main__":
    run_named({"quality": _QUALITY, "timing": _TIMING}, sys.argv[1:])
