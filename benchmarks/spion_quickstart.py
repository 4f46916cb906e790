"""Does block-sparse attention found by SPION cost quality, and what does it save?

    python -m benchmarks.spion_quickstart quality
    python -m benchmarks.spion_quickstart timing

The model, data and number of steps are the quickstart's. Dense attention is the control. The fixed
patterns are sparse from the first step and keep as many blocks as SPION-CF finds on this data;
SPION-C is asked for a density that leaves it there too, after its overlap with the diagonal.
"""

import sys

from benchmarks.experiments import Experiment, Setting, run_experiment

_CONFIG = "configs/quickstart.py"
_DENSITY = 0.14


def _static(pattern: str, density: float) -> Setting:
    overrides = {
        "recipe.name": "static_attention",
        "recipe.static_attention.pattern": pattern,
        "recipe.static_attention.density": density,
    }
    return Setting(config=_CONFIG, overrides=overrides)


_DENSE = Setting(config=_CONFIG, overrides={"recipe.name": "dense"})
_QUALITY = Experiment(
    name="spion_quickstart_quality",
    kind="quality",
    settings={
        "dense": _DENSE,
        "SPION-CF": Setting(config=_CONFIG),
        "SPION-F": Setting(config=_CONFIG, overrides={"recipe.spion.variant": "f"}),
        "SPION-C": Setting(
            config=_CONFIG,
            overrides={"recipe.spion.variant": "c", "recipe.spion.density": 0.19},
        ),
        "sliding window": _static("sliding_window", _DENSITY),
        "Longformer": _static("longformer", _DENSITY),
        "BigBird": _static("bigbird", _DENSITY),
    },
    seeds=(0, 1, 2),
    columns={
        "validation loss": "validation_loss",
        "accuracy": "validation_accuracy",
        "attention density": "sparse_attention_density",
        "sparse from step": "sparse_first_step",
    },
)


def _short(setting: Setting) -> Setting:
    overrides = {"num_steps": 40, "eval_every_steps": 40, "checkpoint.every_steps": 40}
    return Setting(config=setting.config, overrides={**setting.overrides, **overrides})


_TIMING = Experiment(
    name="spion_quickstart_timing",
    kind="timing",
    settings={
        "dense, jax.nn": _short(_DENSE),
        # Every block kept, but computed by the block-sparse loop: causal blocks above the diagonal
        # cost nothing, which the dense attention of jax.nn pays for.
        "dense, own loop": _short(_static("sliding_window", 1.0)),
        "SPION-CF": _short(
            Setting(
                config=_CONFIG,
                overrides={
                    "recipe.spion.probe_every_steps": 20,
                    "recipe.spion.latest_switch_step": 20,
                },
            )
        ),
    },
    seeds=(0, 1, 2),
    columns={
        "dense step, s": "dense_step_seconds",
        "sparse step, s": "sparse_step_seconds",
        "attention density": "sparse_attention_density",
        "dense step, bytes": "dense_step_memory_bytes",
        "sparse step, bytes": "sparse_step_memory_bytes",
    },
)


def main(arguments: list[str]) -> None:
    """Run the experiment named on the command line.

    Args:
      arguments: list with "quality" or "timing".

    Raises:
      SystemExit: if it names neither.
    """
    experiments = {"quality": _QUALITY, "timing": _TIMING}
    if len(arguments) != 1 or arguments[0] not in experiments:
        raise SystemExit(f"expected one of {list(experiments)}, got {arguments}")
    run_experiment(experiments[arguments[0]])


if __name__ == "__main__":
    main(sys.argv[1:])
