"""Triton kernels compiled on one machine and proven on another: `make gpu-export TARGET=h200`.

A GPU machine may have another version of Triton, or none; its own JAX runs the kernels all the same
if they come compiled. Contract problems are exported here for a GPU that need not be there, with
`jax.export`, to `.gpu-export`. `make gpu` runs them on a machine that has that GPU and no Triton of
ours: copy the folder there, beside the same sources.

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.exported_calls h200
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export

from benchmarks.environment import ROOT
from pallas_kernels.aot import TARGETS
from pallas_kernels.backends import find_backend
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor.child import shrink
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.problem import Function, Problem
from pallas_kernels.doctor.trials import Trial, list_default_calls
from pallas_kernels.tables import TABLES
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton_programs import CALL_TARGET
from pallas_kernels.verdicts import describe_call

FOLDER = ROOT / ".gpu-export"
MANIFEST = "manifest.json"
# Module -> package: what `jax.export` writes and reads with, and what kernels are packed with.
NEEDS = {"flatbuffers": "flatbuffers", "jax_cuda13_plugin": "'sparsejax[compile]'"}
_NAME = "triton"

# op -> changes of its first default call: what those leave out.
_MORE: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "block_sparse_attention": (
        {"num_heads": 8, "num_kv_heads": 2, "mask_shape": (1, 8), "has_segments": True},
        {"head_dim": 128, "scale": 128**-0.5, "block_q": 128, "block_kv": 128, "causal": False},
        {"dtype": "float32", "block_q": 32, "block_kv": 32, "pruned_logits": "zero"},
    ),
    "mean_attention_map": (
        {"num_queries": 1000, "num_keys": 1500, "has_kv_mask": True, "has_lse": False},
        {"causal": True, "has_lse": False, "head_dim": 128, "dtype": "float16"},
        {"causal": True, "has_lse": False, "head_dim": 80, "dtype": "float32"},
    ),
    # A gate, and so few tiles of the gradient of the weight that its contraction is divided.
    "nm_matmul": (
        {
            "rows": 8192,
            "inner": 640,
            "columns": 1280,
            "dtype": "float16",
            "activation": "swiglu",
            "grad_pruning": "mvue_exact",
            "has_bias": False,
        },
    ),
}


def list_calls() -> list[tuple[str, Any]]:
    """List the calls that are exported: a handful for each op that has Triton kernels.

    Returns:
      list of (op, facts).
    """
    defaults = list_default_calls()
    first = dict(reversed(defaults))
    more = [(op, dataclasses.replace(first[op], **new)) for op in _MORE for new in _MORE[op]]
    with_kernels = {op for op, table in TABLES.items() if any(row.name == _NAME for row in table)}
    return [(op, facts) for op, facts in defaults + more if op in with_kernels]


def find_missing(*modules: str) -> str:
    """Say which module is missing, and how it is installed.

    Args:
      *modules: names in `NEEDS`.

    Returns:
      str, one line; "" if all are there.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            return f"exported calls need {name}, which is not installed: pip install {NEEDS[name]}"
    return ""


def export_problem(
    problem: Problem, implementation: str, directions: tuple[str, ...], platform: str = "cuda"
) -> bytes:
    """Trace and lower what a problem asks of a backend, for the device of the abstract mesh.

    Args:
      problem: what the backend is asked.
      implementation: name of the backend.
      directions: all of the problem, or the first.
      platform: that it is lowered for.

    Returns:
      bytes that `read_function` reads.

    Raises:
      NotImplementedError: if the backend does not do this, with the reason.
    """
    call = problem.call(implementation, directions)

    def run(inputs, mask):
        # As the contract runs its functions.
        with jax.default_matmul_precision("highest"):
            return call(inputs, mask)

    mask = next(iter(problem.masks.values()))
    allowed = jax.export.DisabledSafetyCheck.custom_call(CALL_TARGET)
    export = jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=[allowed])
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (problem.inputs, mask))
    return bytes(export(*structs).serialize())


def read_function(blob: bytes) -> Function:
    """Read what `export_problem` wrote; neither Triton nor jax-triton is needed.

    Returns:
      function (inputs, mask) -> results.
    """
    exported = jax.export.deserialize(bytearray(blob))

    def run(inputs, mask):
        return tuple(exported.call(inputs, mask))

    return run


def export_calls(target: str, folder: pathlib.Path, *, say: Callable[[str], None]) -> int:
    """Export all calls for a GPU, in place of what the folder holds.

    Args:
      target: name of the GPU in `TARGETS`.
      folder: of the files.
      say: called with a line for each call.

    Returns:
      int, exit code: 0, or 2 if kernels cannot be compiled here.
    """
    gpu = TARGETS[target]
    mesh = make_abstract_gpu(gpu.name, gpu.cores)
    if missing := find_missing(*NEEDS):
        say(missing)
        return 2
    with jax.sharding.use_abstract_mesh(mesh):
        try:
            check_device()
        except NotImplementedError as reason:
            say(str(reason))
            return 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = []
    for op, facts in list_calls():
        backend, name = find_backend(op, TABLES[op], _NAME), describe_call(op, facts)
        with jax.sharding.use_abstract_mesh(mesh):
            try:
                backend.check(facts)
            except NotImplementedError as reason:
                say(f"{name}: not exported: {reason}")
                continue
            facts = shrink(Trial(op, _NAME, facts), backend)
            tile = backend.tile(facts)
        problem = MAKERS[op].make(facts)
        directions, refused = tuple(problem.names), ""
        with jax.sharding.use_abstract_mesh(mesh):
            try:
                blob = export_problem(problem, _NAME, directions)
            except NotImplementedError as reason:
                directions, refused = directions[:1], str(reason)
                blob = export_problem(problem, _NAME, directions)
        file = f"{len(entries):02}_{op}.bin"
        (folder / file).write_bytes(blob)
        entry = {"file": file, "tile": tile, "directions": directions, "refused_gradient": refused}
        entries.append(entry | Trial(op, _NAME, facts).to_json())
        say(f"{name}: {len(blob) / 1e3:.0f} kB, {' and '.join(directions)}")
    manifest = {
        "target": target,
        "capability": ".".join(map(str, gpu.compute_capability)),
        "jax": jax.__version__,
        "source": hash_package(),
        "calls": entries,
    }
    # Last, so that there is none where an export did not end.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return 0


def hash_package() -> str:
    """Hash the text of `pallas_kernels`: kernels, problems and contract, whatever Python reads it.

    Returns:
      str, 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pallas_kernels").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n{path.read_text()}\n".encode())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the calls for a GPU.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0, or 2 if the GPU is unknown or kernels cannot be compiled here.
    """
    parser = argparse.ArgumentParser(description="Export Triton kernels for a GPU.")
    parser.add_argument("target", help=f"one of {', '.join(TARGETS)}")
    target = parser.parse_args(arguments).target
    if target not in TARGETS:
        print(f"TARGET must be one of {', '.join(TARGETS)}, got {target!r}", file=sys.stderr)
        return 2
    return export_calls(target, FOLDER, say=print)


if __name__ == "__main__":
    sys.exit(main())
