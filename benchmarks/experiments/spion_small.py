"""What does block-sparse attention found by SPION save?

    make experiments NAME=spion_small_timing

Model and data are those of `configs/spion_small.py`, 2048 bytes of source text at a time.
"""

from benchmarks.experiments.plan import Experiment, shorten, static_attention, use_recipe

_CONFIG = "configs/spion_small.py"
_SWITCH = {"probe_interval_fraction": 0.5, "latest_switch_fraction": 0.5}
_ROWS = {
    "dense, jax.nn": use_recipe(_CONFIG, "dense"),
    # Every block kept, but computed by the block-sparse loop: causal blocks above the diagonal
    # cost nothing, which the dense attention of jax.nn pays for.
    "dense, own loop": static_attention(_CONFIG, "sliding_window", 1.0),
    "SPION-CF": use_recipe(_CONFIG, "spion", **_SWITCH),
}
SPION_SMALL_TIMING = Experiment(
    name="spion_small_timing",
    kind="timing",
    settings={row: shorten(setting, 40) for row, setting in _ROWS.items()},
    seeds=(0, 1, 2),
    columns={
        "dense step, s": "dense_step_seconds",
        "sparse step, s": "sparse_step_seconds",
        "attention density": "sparse_attention_density",
        "dense step, bytes": "dense_step_memory_bytes",
        "sparse step, bytes": "sparse_step_memory_bytes",
    },
)
