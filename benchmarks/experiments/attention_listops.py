"""Which sparse attention keeps the accuracy of dense attention on ListOps?

    make experiments NAME=attention_listops
    make experiments NAME=attention_listops_timing

Model, data and number of steps are those of `configs/sat_quickstart.py`: sequences of 21 to 199
symbols, which two CPU cores can train on; the published task has up to 2000. All patterns keep the
share of blocks that SAT keeps, fixed ones from the first step on. SPION probes every 50 steps, SAT
in every step as published; both switch at half of the run at the latest (ours: in so short a run
their own conditions may not come).
"""

from benchmarks.experiments.plan import (
    Experiment,
    shorten,
    static_attention,
    use_recipe,
)

_CONFIG = "configs/sat_quickstart.py"
_DENSITY = 0.15
_LATEST = 0.5


_SPION = {"filter_size": 15, "probe_interval_fraction": 1 / 12, "latest_switch_fraction": _LATEST}

LISTOPS = Experiment(
    name="attention_listops",
    kind="quality",
    settings={
        "dense": use_recipe(_CONFIG, "dense"),
        "SPION-CF": use_recipe(_CONFIG, "spion", quantile=0.85, **_SPION),
        "SPION-C": use_recipe(_CONFIG, "spion", variant="c", density=0.2, **_SPION),
        "SAT": use_recipe(_CONFIG, "sat", latest_switch_fraction=_LATEST),
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
LISTOPS_TIMING = Experiment(
    name="attention_listops_timing",
    kind="timing",
    settings={
        "dense, jax.nn": shorten(LISTOPS.settings["dense"], _TIMED_STEPS),
        "dense, own loop": shorten(static_attention(_CONFIG, "sliding_window", 1.0), _TIMED_STEPS),
        "SPION-CF": shorten(
            LISTOPS.settings["SPION-CF"],
            _TIMED_STEPS,
            recipe__spion__probe_interval_fraction=_SWITCH,
            recipe__spion__latest_switch_fraction=_SWITCH,
        ),
        "SAT": shorten(
            LISTOPS.settings["SAT"],
            _TIMED_STEPS,
            recipe__sat__latest_switch_fraction=_SWITCH,
            recipe__sat__min_skewness=1e9,
        ),
        **{
            name: shorten(LISTOPS.settings[name], _TIMED_STEPS)
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
