"""Tiny runs of all recipes, for what does not depend on size: killing and resuming them."""

import pathlib
from collections.abc import Mapping
from typing import Any

from configs import base

_NUM_STEPS = 12
_TINY: dict[str, Any] = {
    "num_steps": _NUM_STEPS,
    "eval_every_steps": 4,
    "num_eval_batches": 2,
    "log_every_steps": 4,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "model.block_size": 16,
    "model.dropout_rate": 0.1,
    "data.sequence_length": 64,
    "data.batch_size": 4,
    "optimizer.learning_rate": 1e-2,
    "checkpoint.every_steps": 3,
    "recipe.spion.quantile": 0.5,
    "recipe.spion.filter_size": 3,
    "recipe.spion.max_change_percent": 1,
    "recipe.spion.probe_interval_fraction": 1 / 6,
    "recipe.spion.latest_switch_fraction": 0.5,
    "recipe.sat.density": 0.6,
    "recipe.sat.min_skewness": 1e9,
    "recipe.sat.latest_switch_fraction": 0.5,
    "recipe.static_attention.density": 0.7,
    "recipe.static_attention.dense_fraction": 0.4,
    "recipe.dynamic_attention.density": 0.7,
    "recipe.dynamic_attention.dense_fraction": 0.4,
    "recipe.fst.refresh_steps": 2,
    "recipe.fst.dense_fraction": 0.3,
    "recipe.fst.grad_pruning": "mvue",
    "recipe.sste.flip_interval_steps": 2,
    "recipe.mst.warmup": 0.25,
    "recipe.mst.restoration": 0.34,
    "recipe.mst.stairs": 2,
    "recipe.mst.attention_stride": 16,
} | {
    f"recipe.{name}.update_interval_fraction": 2 / _NUM_STEPS
    for name in ("mst", "rigl", "set", "magnitude")
}


def make_settings(folder: pathlib.Path, recipe: str, **changes: Any) -> dict[str, Any]:
    """Return settings of a run on text that is written into the folder.

    Args:
      folder: for text and data.
      recipe: its name.
      **changes: of other settings, with "__" for the dots of a key.
    """
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("".join(f"{i} and {i % 9} make {i + i % 9}.\n" for i in range(600)))
    config = base.get_config()
    data = {"source": f"text:{corpus}", "data_dir": str(folder / "data")}
    settings = _TINY | {f"data.{name}": value for name, value in data.items()}
    settings |= {"recipe.name": recipe, **{k.replace("__", "."): v for k, v in changes.items()}}
    config.update_from_flattened_dict(settings)
    return config.to_dict()


RUNS: dict[str, Mapping[str, Any]] = {
    "dense": {"recipe": "dense"},
    "spion": {"recipe": "spion"},
    "sat": {"recipe": "sat"},
    "static_attention": {"recipe": "static_attention"},
    "dynamic_attention": {"recipe": "dynamic_attention"},
    "fst": {"recipe": "fst"},
    "sste": {"recipe": "sste"},
    "mst": {"recipe": "mst"},
    "rigl": {"recipe": "rigl"},
    "set": {"recipe": "set"},
    "magnitude": {"recipe": "magnitude"},
    "static_weights": {"recipe": "static_weights"},
    "spion+fst": {"recipe": "spion+fst", "checkpoint__every_steps": 2},
    "spion per head": {"recipe": "spion", "recipe__spion__per_head": True},
    "sat per head": {"recipe": "sat", "recipe__sat__per_head": True},
}
"""What is trained, by a name for the table: `make_settings` takes these."""
