"""Which sparse attention keeps the accuracy of dense attention on ListOps?

    python -m benchmarks.attention_listops

Model, data and number of steps are those of `configs/sat_quickstart.py`: sequences of 21 to 199
symbols, which two CPU cores can train on; the published task has up to 2000. All patterns keep the
share of blocks that SAT keeps, fixed ones from the first step on. SPION probes every 50 steps, SAT
in every step as published; both switch at half of the run at the latest (ours: in so short a run
their own conditions may not come).
"""

from benchmarks.experiments import Experiment, Setting, run_experiment

_CONFIG = "configs/sat_quickstart.py"
_DENSITY = 0.15
_LATEST = 300


def _setting(name: str, **overrides) -> Setting:
    options = {f"recipe.{name}.{key}": value for key, value in overrides.items()}
    return Setting(config=_CONFIG, overrides={"recipe.name": name, **options})


_SPION = {"filter_size": 15, "probe_every_steps": 50, "latest_switch_step": _LATEST}

EXPERIMENT = Experiment(
    name="attention_listops",
    kind="quality",
    settings={
        "dense": Setting(config=_CONFIG, overrides={"recipe.name": "dense"}),
        "SPION-CF": _setting("spion", quantile=0.85, **_SPION),
        "SPION-C": _setting("spion", variant="c", density=0.2, **_SPION),
        "SAT": _setting("sat", latest_switch_step=_LATEST),
        "sliding window": _setting("static_attention", pattern="sliding_window", density=_DENSITY),
        "Longformer": _setting("static_attention", pattern="longformer", density=_DENSITY),
        "BigBird": _setting("static_attention", pattern="bigbird", density=_DENSITY),
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

if __name__ == "__main__":
    run_experiment(EXPERIMENT)
