"""Runs on eight fake devices against the same runs on one: the program that `test_meshes` starts.

JAX counts its devices once, so these runs need a process of their own. Arguments are "recipe mesh"
pairs, or none for all; what differs from one device goes to standard output as JSON.
"""

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from sparsejax.checkpoint.leaves import name_leaves
from sparsejax.training import devices, setup
from tests.flags.recipes import RECIPES, make_settings
from tests.training import runs

MESHES = {
    "fsdp=8": {"fsdp": 8},
    "data=2 fsdp=4": {"fsdp": 4},
    "data=2 fsdp=2 tensor=2": {"fsdp": 2, "tensor": 2},
    "fsdp=2 context=4": {"fsdp": 2, "context": 4},
}
_SIZES = {
    "data__batch_size": 8,
    "model__num_heads": 4,
    "model__num_layers": 2,
}


def list_runs() -> Iterator[tuple[str, str]]:
    """List recipe and mesh of every run."""
    for recipe in RECIPES:
        for mesh in MESHES:
            yield recipe, mesh


@functools.cache
def train_on_one(recipe: str):
    """Train on one device; return the rows of metrics and the last state."""
    return _train(recipe, {}, jax.devices()[:1])


def _train(recipe: str, mesh: dict[str, int], chosen: list[Any] | None):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = pathlib.Path(name)
        make = functools.partial(devices.make_run_mesh, devices=chosen)
        patch.setattr(setup, "make_run_mesh", make)
        settings = make_settings(folder, recipe, **_SIZES)
        settings["mesh"] |= mesh
        runs.train(settings, folder / "run")
        rows = [
            row
            for row in runs.read_metrics(folder / "run" / "metrics.jsonl")
            if row["kind"] in ("train", "validation")
        ]
        return rows, runs.load_end(settings, folder / "run")[0]


def compare(recipe: str, mesh: str) -> dict[str, Any]:
    """Compare a run on a mesh with that on one device.

    Returns:
      "loss", the largest difference of a loss; "leaf", the same of the last state; "masks", the
      fraction of entries of masks that differ.
    """
    (rows, state), (found_rows, found) = train_on_one(recipe), _train(recipe, MESHES[mesh], None)
    losses = [
        [row.get("loss", row.get("validation_loss")) for row in x] for x in (rows, found_rows)
    ]
    leaves, found_leaves = (
        {k: v for k, v in name_leaves(x).items() if v is not None} for x in (state, found)
    )
    worst, differing, total = 0.0, 0, 0
    for path, leaf in leaves.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        a, b = np.asarray(leaf), np.asarray(found_leaves[path])
        if a.dtype == bool:
            differing, total = differing + int((a != b).sum()), total + a.size
        elif np.issubdtype(a.dtype, np.floating):
            worst = max(worst, float(np.abs(a - b).max()))
    return {
        "loss": float(np.abs(np.subtract(*losses)).max()),
        "leaf": worst,
        "masks": differing / max(total, 1),
    }


if __name__ == "__main__":
    pairs = [tuple(pair.split("/")) for pair in sys.argv[1:]] or [*list_runs()]
    sys.stdout, told = sys.stderr, sys.stdout
    results = {}
    import time

    for pair in pairs:
        t = time.time()
        train_on_one(pair[0])
        t1 = time.time()
        try:
            results["/".join(pair)] = compare(*pair)
        except Exception as e:
            import traceback

            traceback.print_exc()
            results["/".join(pair)] = repr(e)[:400]
        print(
            pair,
            results["/".join(pair)],
            round(t1 - t, 1),
            round(time.time() - t1, 1),
            file=told,
            flush=True,
        )
    json.dump(results, told)
