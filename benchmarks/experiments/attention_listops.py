"""What do SPION, SAT and fixed patterns save on short ListOps?

    make experiments NAME=attention_listops_timing

The model is that of `configs/sat_quickstart.py`: sequences of 21 to 199 symbols, which two CPU
cores can train on; the published task has up to 2000. All patterns keep the share of blocks that
SAT keeps, SPION-CF about as many.
"""

from benchmarks.experiments.plan import Experiment, shorten, static_attention, use_recipe

_CONFIG = "configs/sat_quickstart.py"
_DENSITY = 0.15
_SWITCH = 0.5
_SPION = {
    "filter_size": 15,
    "quantile": 0.85,
    "probe_interval_fraction": _SWITCH,
    "latest_switch_fraction": _SWITCH,
}
_SAT = {"min_skewness": 1e9, "latest_switch_fraction": _SWITCH}
_ROWS = {
    "dense, jax.nn": use_recipe(_CONFIG, "dense"),
    # Every block kept, by the block-sparse loop.
    "dense, own loop": static_attention(_CONFIG, "sliding_window", 1.0),
    "SPION-CF": use_recipe(_CONFIG, "spion", **_SPION),
    "SAT": use_recipe(_CONFIG, "sat", **_SAT),
    "sliding window": static_attention(_CONFIG, "sliding_window", _DENSITY),
    "Longformer": static_attention(_CONFIG, "longformer", _DENSITY),
    "BigBird": static_attention(_CONFIG, "bigbird", _DENSITY),
}
LISTOPS_TIMING = Experiment(
    name="attention_listops_timing",
    kind="timing",
    settings={row: shorten(setting, 80) for row, setting in _ROWS.items()},
    seeds=(0, 1, 2),
    columns={
        "dense step, s": "dense_step_seconds",
        "sparse step, s": "sparse_step_seconds",
        "attention density": "sparse_attention_density",
        "dense step, bytes": "dense_step_memory_bytes",
        "sparse step, bytes": "sparse_step_memory_bytes",
    },
)
