"""Runs on eight fake devices against the same runs on one: what `test_mesh_runs` starts.

JAX counts its devices once, so these runs need a process of their own. Arguments are names out of
`list_runs`; what differs from one device goes to standard output as JSON.
"""

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np

from sparsejax.checkpoint.files import find_checkpoints
from sparsejax.checkpoint.leaves import name_leaves
from sparsejax.checkpoint.save import restore
from sparsejax.config.parse import parse_config
from sparsejax.training import devices, setup
from tests.flags.recipes import RECIPES, make_settings
from tests.training import runs

MESHES = {
    "fsdp=8": {"fsdp": 8},
    "data=2 fsdp=4": {"fsdp": 4},
    "data=2 fsdp=2 tensor=2": {"fsdp": 2, "tensor": 2},
    "context=4": {"context": 4},
}
RESUMED = {"8 to 1": (8, 1), "1 to 8": (1, 8), "4 to 8": (4, 8), "8 to 8": (8, 8)}
SHORT = "short"
"""A run of two steps: sparse weights, pruned gradients, new masks in every step."""

_SIZES = {"data__batch_size": 8, "model__num_heads": 4, "model__num_layers": 2}
_SHORT = {
    "num_steps": 2,
    "eval_every_steps": 2,
    "checkpoint__every_steps": 2,
    "optimizer__warmup_fraction": 0.5,
    "recipe__fst__dense_fraction": 0.0,
    # Gates, and fewer heads of keys and values.
    "model__mlp_activation": "geglu",
    "model__num_kv_heads": 2,
}


def list_runs() -> list[str]:
    """List the names of all runs: "recipe/mesh", or "resume/from to"."""
    meshes = [f"{recipe}/{mesh}" for recipe in RECIPES for mesh in MESHES]
    return [*meshes, *(f"resume/{name}" for name in RESUMED)]


def _train(folder: pathlib.Path, recipe: str, mesh: dict[str, int], count: int, **changes: Any):
    """Train on so many of the devices; return the rows of losses and the last state."""
    name, sizes = ("fst", _SIZES | _SHORT) if recipe == SHORT else (recipe, _SIZES)
    settings = make_settings(folder, name, **sizes | changes)
    settings["mesh"] |= mesh
    make_mesh = functools.partial(devices.make_run_mesh, devices=jax.devices()[:count])
    with (
        mock.patch.object(setup, "make_run_mesh", make_mesh),
        mock.patch("jax.device_count", lambda: count),
    ):
        runs.train(settings, folder / "run")
        losses = [
            row.get("loss", row.get("validation_loss"))
            for row in runs.read_metrics(folder / "run" / "metrics.jsonl")
            if row["kind"] in ("train", "validation")
        ]
        return losses, _load(settings, folder)


def _load(settings: dict[str, Any], folder: pathlib.Path) -> dict[str, jax.Array]:
    info = find_checkpoints(folder / "run" / "checkpoints")[0]
    run = setup.prepare_run(parse_config(settings))
    state, _ = restore(info, run.make_abstract_state(info.metadata["phase"]))
    leaves = {name: leaf for name, leaf in name_leaves(state).items() if leaf is not None}
    return {
        name: jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for name, leaf in leaves.items()
    }


@functools.cache
def _train_on_one(recipe: str):
    with tempfile.TemporaryDirectory() as folder:
        return _train(pathlib.Path(folder), recipe, {}, 1)


def compare(recipe: str, mesh: str) -> dict[str, float]:
    """Compare a run on a mesh of eight devices with that on one.

    Args:
      recipe: out of `RECIPES`, or `SHORT`.
      mesh: out of `MESHES`.

    Returns:
      As of `_measure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _train(pathlib.Path(folder), recipe, MESHES[mesh], 8)
    return _measure(_train_on_one(recipe), found)


def compare_resumed(before: int, after: int) -> dict[str, float]:
    """Compare a run that goes on on other devices with one that stays on one device.

    If it goes on on the same devices, with one that was never stopped.

    Args:
      before: devices of the first step, all of "fsdp".
      after: those of the second.

    Returns:
      As of `_measure`, and "restored", leaves that are not restored bit for bit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        half = {"num_steps": 1, "schedule_steps": 2}
        _, saved = _train(folder, SHORT, {"fsdp": before}, before, **half)
        settings = make_settings(folder, "fst", **_SIZES | _SHORT)
        settings["mesh"] |= {"fsdp": after}
        make_mesh = functools.partial(devices.make_run_mesh, devices=jax.devices()[:after])
        with mock.patch.object(setup, "make_run_mesh", make_mesh):
            restored = _load(settings, folder)
        differing = sum(
            not np.array_equal(np.asarray(leaf), np.asarray(restored[path]))
            for path, leaf in saved.items()
        )
        found = _train(folder, SHORT, {"fsdp": after}, after)
    # The first half was the end of a run, and so evaluated.
    losses, leaves = found
    found = [losses[0], *losses[2:]], leaves
    if before != after:
        return _measure(_train_on_one(SHORT), found) | {"restored": differing}
    with tempfile.TemporaryDirectory() as name:
        expected = _train(pathlib.Path(name), SHORT, {"fsdp": after}, after)
    return _measure(expected, found) | {"restored": differing}


def _measure(expected: Any, found: Any) -> dict[str, float]:
    """Return how far a run is from another.

    Returns:
      "loss", the largest relative difference of a loss; "leaf", the largest difference of a float
      of the last state; "masks", the fraction of bools that differ; "held", the fraction of the
      state's bytes that one device holds.
    """
    (losses, leaves), (found_losses, found_leaves) = expected, found
    assert leaves.keys() == found_leaves.keys() and len(losses) == len(found_losses)
    worst, differing, total, held, size = 0.0, 0, 0, 0, 0
    for path, leaf in leaves.items():
        a, other = np.asarray(leaf), found_leaves[path]
        b = np.asarray(other)
        held, size = held + other.addressable_shards[0].data.nbytes, size + b.nbytes
        if a.dtype == bool:
            differing, total = differing + int((a != b).sum()), total + a.size
        elif np.issubdtype(a.dtype, np.floating):
            worst = max(worst, float(np.abs(a - b).max()))
        else:
            assert np.array_equal(a, b), path
    difference = np.abs(np.subtract(losses, found_losses) / losses)
    return {
        "loss": float(difference.max()),
        "leaf": worst,
        "masks": differing / max(total, 1),
        "held": held / size,
    }


def main(names: Sequence[str]) -> None:
    """Print what is found of runs.

    Args:
      names: out of `list_runs`; none for all.
    """
    results = {}
    told, sys.stdout = sys.stdout, sys.stderr
    for name in names or list_runs():
        first, _, second = name.partition("/")
        if first == "resume":
            results[name] = compare_resumed(*RESUMED[second])
        else:
            results[name] = compare(first, second)
    json.dump(results, told)


if __name__ == "__main__":
    main(sys.argv[1:])
