"""Settings of a short run of every recipe, with every change of phase that it has."""

from tests.training import runs

_FST = {
    "recipe__fst__refresh_steps": 1,
    "recipe__fst__decay_rate": 1e-2,
    "recipe__fst__dense_fraction": 0.34,
    "recipe__fst__grad_pruning": "mvue",
}
_SPION = {
    "recipe__spion__walk": "greedy",  # the only one with metrics of a phase
    "recipe__spion__latest_switch_fraction": 2 / 6,
    "recipe__spion__probe_interval_fraction": 1 / 6,
}
_MST = {
    "recipe__mst__sparsity": 0.5,
    "recipe__mst__sparse_weights": ".*=16x16",
    "recipe__mst__update_interval_fraction": 1 / 6,
    "recipe__mst__stairs": 1,
    "recipe__mst__warmup": 0.34,
    "recipe__mst__restoration": 0.34,
    "recipe__mst__attention_stride": 16,
}
_SAT = {
    "recipe__sat__density": 0.75,
    "recipe__sat__latest_switch_fraction": 3 / 6,
    "recipe__sat__min_skewness": 1e9,
}
RECIPES = {
    "dense": {},
    "spion": _SPION,
    "sat": _SAT,
    "static_attention": {"recipe__static_attention__density": 0.75},
    "dynamic_attention": {
        "recipe__dynamic_attention__density": 0.75,
        "recipe__dynamic_attention__num_sinks": 0,
        "recipe__dynamic_attention__dense_fraction": 0.34,
    },
    "fst": _FST,
    "sste": {"recipe__sste__flip_interval_steps": 2},
    "mst": _MST,
    "rigl": {
        "recipe__rigl__sparsity": 0.5,
        "recipe__rigl__sparse_weights": ".*=unstructured",
        "recipe__rigl__update_interval_fraction": 1 / 6,
    },
    "set": {
        "recipe__set__sparsity": 0.5,
        "recipe__set__sparse_weights": "mlp/.*=2:4",
        "recipe__set__update_interval_fraction": 1 / 6,
    },
    "magnitude": {
        "recipe__magnitude__sparsity": 0.5,
        "recipe__magnitude__update_interval_fraction": 1 / 6,
    },
    "static_weights": {"recipe__static_weights__sparsity": 0.5},
    "spion+fst": _SPION | _FST,
    "spion per head": _SPION
    | {"recipe__name": "spion", "recipe__spion__per_head": True, "model__num_kv_heads": 2},
    "sat per head": _SAT
    | {"recipe__name": "sat", "recipe__sat__per_head": True, "model__num_kv_heads": 2},
}
"""Name of the recipe, or of what is special of it -> changes of the settings."""


def make_settings(folder, name, **changes):
    """Return settings of a run of six steps of one layer.

    Args:
      folder: where its text is written.
      name: out of `RECIPES`.
    """
    short = {
        "num_steps": 6,
        "eval_every_steps": 3,
        "num_eval_batches": 1,
        "checkpoint__every_steps": 3,
        "optimizer__warmup_fraction": 1 / 6,
        "model__num_layers": 1,
        "data__sequence_length": 32,
        "data__batch_size": 2,
        "recipe__name": name,
    }
    return runs.make_settings(folder, **short | RECIPES[name] | changes)
