"""Do two versions of the tree train alike, bit for bit? A hundred steps of every recipe decide.

  python -m benchmarks.same_training record before.json --tree=path/to/other/checkout
  python -m benchmarks.same_training record after.json
  python -m benchmarks.same_training compare before.json after.json

A record holds, for each run, the losses that were logged and the SHA-256 of every leaf of the last
checkpoint. Runs are started as a user starts them, by `train.py` in the tree, so that the two
versions may differ in everything else. Records are comparable on one machine only: compilers choose
other instructions elsewhere.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

_NUM_STEPS = 100


class _Run(NamedTuple):
    config: str
    flags: Mapping[str, Any] = {}


_SHORT = {"data.sequence_length": 512, "recipe.spion.probe_interval_fraction": 0.1}
_SMALL = {"model.num_layers": 2, "data.sequence_length": 128, "num_eval_batches": 2}
_MST = {
    "recipe.mst.warmup": 0.1,
    "recipe.mst.stairs": 3,
    "recipe.mst.restoration": 0.3,
    "recipe.mst.update_interval_fraction": 0.05,
}
_DYNAMIC = {
    "mst_small": _Run("mst_small", _SMALL | _MST),
    "static": _Run("mst_small", _SMALL | {"recipe.name": "static_weights"}),
} | {
    name: _Run("mst_small", _SMALL | {"recipe.name": name})
    for name in ("dense", "rigl", "set", "magnitude")
}
_BLOCKS = {
    "recipe.mst.sparse_weights": ".*/.*=32x32; embedding=unstructured",
    "num_micro_batches": 2,
}
_LISTOPS = {"data.listops_examples": 4800, "data.batch_size": 8, "num_eval_batches": 4}
_SWITCH = {"recipe.sat.latest_switch_fraction": 0.6, "optimizer.warmup_fraction": 0.2}
RUNS: dict[str, _Run] = {
    "quickstart": _Run("quickstart"),
    "spion_small": _Run("spion_small"),
    "spion-c": _Run(
        "spion_small",
        _SHORT
        | {"recipe.spion.variant": "c", "recipe.spion.density": 0.4}
        # "c" knows neither.
        | {"recipe.spion.quantile": None, "recipe.spion.walk": None},
    ),
    "spion-f": _Run("spion_small", _SHORT | {"recipe.spion.variant": "f"}),
    "static_attention": _Run(
        "spion_small",
        {
            "recipe.name": "static_attention",
            "recipe.static_attention.dense_fraction": 0.5,
            "recipe.static_attention.pattern": "bigbird",
            "recipe.static_attention.density": 0.3,
            "data.sequence_length": 512,
        },
    ),
    "sat": _Run("sat_quickstart", _LISTOPS | _SWITCH),
    "fst": _Run("fst_small", _SMALL),
    "fst, mvue": _Run(
        "fst_small",
        _SMALL | {"recipe.fst.grad_pruning": "mvue", "model.mlp_activation": "geglu"},
    ),
    "sr_ste": _Run("fst_small", _SMALL | {"recipe.fst.variant": "sr_ste"}),
    "sste": _Run("fst_small", _SMALL | {"recipe.name": "sste"}),
    "masked": _Run("fst_small", _SMALL | {"data.mask_fraction": 0.15, "model.dropout_rate": 0.1}),
    **_DYNAMIC,
    "mst, blocks": _Run("mst_small", _SMALL | _MST | _BLOCKS),
}
"""What is trained, by a name for the record."""


def record_run(tree: pathlib.Path, run: _Run) -> dict[str, Any]:
    """Train in a tree and describe how it went.

    Args:
      tree: folder with `train.py`.
      run: one of `RUNS`.

    Returns:
      dict with "losses", those logged by step, and "leaves", path of a leaf -> its type, shape and
      SHA-256.

    Raises:
      RuntimeError: if the run fails, with the end of what it printed.
    """
    flags = {"num_steps": _NUM_STEPS, "checkpoint.every_steps": _NUM_STEPS, **run.flags}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", f"--config=configs/{run.config}.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        rows = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
        losses = [
            [row["step"], row[name]]
            for row in map(json.loads, rows)
            for name in ("loss", "validation_loss")
            if name in row
        ]
        (folder,) = (pathlib.Path(workdir) / "checkpoints").glob("0*")
        leaves = ocp.load(str(folder))
        hashes = {name: _hash_leaf(leaves[name]) for name in sorted(leaves)}
    return {"losses": losses, "leaves": hashes}


def find_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List in which runs two records differ, and where first.

    Args:
      before: what `record_run` returned, by name of the run.
      after: the same of another tree.

    Returns:
      list of str, one for each run that differs; empty if all are equal.

    Example:
      >>> run = {"losses": [[1, 2.5]], "leaves": {"step": "int32[] 00"}}
      >>> find_differences({"fst": run}, {"fst": run | {"losses": [[1, 2.25]]}})
      ['fst: losses [1, 2.5] -> [1, 2.25]; 0 of 1 leaves']
    """
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            lines.append(f"{name}: only in one record")
            continue
        old, new = before[name], after[name]
        if old == new:
            continue
        pairs = zip(old["losses"], new["losses"], strict=False)
        loss = next((f"{a} -> {b}" for a, b in pairs if a != b), "equal as far as both go")
        names = sorted(old["leaves"].keys() | new["leaves"].keys())
        others = [leaf for leaf in names if old["leaves"].get(leaf) != new["leaves"].get(leaf)]
        shown = f", {others[0]} first" if others else ""
        lines.append(f"{name}: losses {loss}; {len(others)} of {len(names)} leaves{shown}")
    return lines


def _hash_leaf(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype}{list(array.shape)} {digest}"


def _record(path: pathlib.Path, tree: pathlib.Path, names: Sequence[str]) -> None:
    for name in names:
        # Read anew and written at once: what was recorded survives a run that fails.
        records = json.loads(path.read_text()) if path.exists() else {}
        records[name] = record_run(tree, RUNS[name])
        path.write_text(json.dumps(records, indent=1) + "\n")
        losses = records[name]["losses"]
        print(f"{name}: {len(records[name]['leaves'])} leaves, last {losses[-1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare, as the command line says.

    Args:
      arguments: words of the command line, None for those of the process.

    Returns:
      int, exit code: 1 if records differ.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_training")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("path", type=pathlib.Path)
    record.add_argument("--tree", type=pathlib.Path, default=pathlib.Path())
    record.add_argument("--run", action="append", choices=RUNS, help="default: all of them")
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=pathlib.Path)
    compare.add_argument("after", type=pathlib.Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        _record(options.path, options.tree, options.run or list(RUNS))
        return 0
    records = [json.loads(path.read_text()) for path in (options.before, options.after)]
    lines = find_differences(*records)
    print("\n".join(lines) or f"{len(records[0])} runs are equal, bit for bit")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
