"""Does block-sparse attention found by SPION cost quality, and what does it save?

    make experiments NAME=spion_small
    make experiments NAME=spion_small_timing

Model, data and number of steps are those of `configs/spion_small.py`. Dense attention is the
control. The fixed patterns are sparse from the first step and keep as many blocks as SPION-CF finds
on this data; SPION-C is asked for a density that leaves it there too, after its overlap with the
diagonal.
"""

from benchmarks.experiments.plan import Experiment, Setting, shorten, static_attention

_CONFIG = "configs/spion_small.py"
_DENSITY = 0.14


_DENSE = Setting(config=_CONFIG, overrides={"recipe.name": "dense"})
SPION_SMALL = Experiment(
    name="spion_small",
    kind="quality",
    settings={
        "dense": _DENSE,
        "SPION-CF": Setting(config=_CONFIG),
        "SPION-F": Setting(config=_CONFIG, overrides={"recipe.spion.variant": "f"}),
        "SPION-C": Setting(
            config=_CONFIG,
            overrides={
                "recipe.spion.variant": "c",
                "recipe.spion.quantile": None,
                "recipe.spion.walk": None,
                "recipe.spion.density": 0.19,
            },
        ),
        "sliding window": static_attention(_CONFIG, "sliding_window", _DENSITY),
        "Longformer": static_attention(_CONFIG, "longformer", _DENSITY),
        "BigBird": static_attention(_CONFIG, "bigbird", _DENSITY),
    },
    seeds=(0, 1, 2),
    columns={
        "validation loss": "validation_loss",
        "accuracy": "validation_accuracy",
        "attention density": "sparse_attention_density",
        "sparse from step": "sparse_first_step",
    },
)

SPION_SMALL_TIMING = Experiment(
    name="spion_small_timing",
    kind="timing",
    settings={
        "dense, jax.nn": shorten(_DENSE, 40),
        # Every block kept, but computed by the block-sparse loop: causal blocks above the diagonal
        # cost nothing, which the dense attention of jax.nn pays for.
        "dense, own loop": shorten(static_attention(_CONFIG, "sliding_window", 1.0), 40),
        "SPION-CF": shorten(
            Setting(config=_CONFIG),
            40,
            recipe__spion__probe_interval_fraction=0.5,
            recipe__spion__latest_switch_fraction=0.5,
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
