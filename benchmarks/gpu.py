"""Prove and measure the kernels on the GPU of this machine: `make gpu`, `make gpu-sweep PART=...`.

`make gpu` runs the kernels' contract tests, those of Triton kernels that were exported elsewhere,
and the headline points of each benchmark within nine minutes; called again, it measures only what
is missing. It needs jax with CUDA, flax, pytest and
hypothesis; PyTorch is measured beside the kernels where it is installed. Without a GPU it says so
and exits with 2, because nothing was proven.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.environment import ROOT
from pallas_kernels.doctor.isolation import run_isolated

BUDGET_SECONDS = 540.0
CONTRACT_SECONDS = 300.0
# A part ends by itself when its budget is spent; what goes on longer hangs.
_GRACE_SECONDS = 30.0
# Of Triton kernels that were exported elsewhere; nothing where Triton is installed.
EXPORTED_SECONDS = 90.0
_NO_LIMIT_SECONDS = 7 * 24 * 3600.0
PARTS = ("l2_bandwidth", "attention", "nm_matmul", "block_sparse_matmul", "fst_gpt2")
SWEEPS = (*PARTS, "nm_matmul_tiles", "grouped_gradients")
# What others build on comes first: if packing is wrong, so is every product of packed weights.
CONTRACTS = (
    "test_nm_packing.py",
    "test_nm_mosaic_sm90.py",
    "test_mosaic_sm90.py",
    "test_block_matmul_mosaic_sm90.py",
    "test_attention_map_mosaic_sm90.py",
    "test_triton.py",
    "test_triton_block_matmul.py",
    "test_triton_map.py",
    "test_triton_nm.py",
    "test_triton_products.py",
    "test_transposable_mask.py",
)
# What a model makes of lengths between blocks goes through the kernels too.
MODELS = "tests/models/test_attention_kernels.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run contracts and headline points, or with `--sweep PART` all points of one benchmark.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 all passed, 1 something failed, 2 no GPU or unknown part.
    """
    parser = argparse.ArgumentParser(description="Prove and measure the kernels on a GPU.")
    parser.add_argument("--sweep", metavar="PART", help=f"all points of one of {SWEEPS}")
    part = parser.parse_args(arguments).sweep
    if part is not None and part not in SWEEPS:
        print(f"PART must be one of {', '.join(SWEEPS)}, got {part!r}", file=sys.stderr)
        return 2
    gpu, reason = find_gpu()
    if gpu is None:
        print(f"No GPU found, so nothing was run. JAX said: {reason}", file=sys.stderr)
        return 2
    print(f"GPU: {gpu}", flush=True)
    if part is not None:
        return 0 if _run_part(part) else 1
    began = time.monotonic()
    passed = [_run_contracts(), _run_exported()]
    for index, part in enumerate(PARTS):
        left = max(BUDGET_SECONDS - (time.monotonic() - began), 0.0)
        # What a part leaves of its share goes to those after it.
        share = left / (len(PARTS) - index)
        budget = f"--budget-seconds={share:.0f}"
        passed.append(_run_part(part, "--headline", budget, seconds=share))
    return 0 if all(passed) else 1


def find_gpu() -> tuple[str | None, str]:
    """Ask JAX for its GPU, in a process of its own that gives the GPU's memory back.

    Returns:
      (name of the GPU, "") or (None, why there is none).
    """
    code = "import jax; print(jax.devices('cuda')[0].device_kind)"
    asked = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **_gpu_environment()},
        capture_output=True,
        text=True,
    )
    if asked.returncode == 0:
        return asked.stdout.strip().splitlines()[-1], ""
    lines = asked.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith(("RuntimeError", "ModuleNotFoundError"))]
    return None, (errors or lines or ["nothing"])[-1]


def _gpu_environment() -> dict[str, str]:
    # The CPU stays available for oracles; tests/conftest.py chooses it alone if nothing is set.
    return {"JAX_PLATFORMS": "cuda,cpu"}


def _run_contracts() -> bool:
    first = [f"tests/kernels/{name}" for name in CONTRACTS]
    # These are about compiling without a GPU and need another compiler installed.
    others = ["tests/kernels", MODELS, *(f"--ignore={path}" for path in first)]
    others += [f"--ignore-glob=tests/kernels/{name}" for name in ("test_aot.py", "*_compiled.py")]
    began, passed = time.monotonic(), []
    groups = [*([path] for path in first), others]
    for index, paths in enumerate(groups):
        left = max(CONTRACT_SECONDS - (time.monotonic() - began), 0.0)
        # What a file leaves of its share goes to those after it.
        passed.append(
            _run("pytest", "-q", *paths, "-m", "not slow", seconds=left / (len(groups) - index))
        )
    return all(passed)


def _run_exported() -> bool:
    budget = f"--budget-seconds={EXPORTED_SECONDS:.0f}"
    return _run("benchmarks.exported_contracts", budget, seconds=EXPORTED_SECONDS)


def _run_part(part: str, *options: str, seconds: float | None = None) -> bool:
    return _run(f"benchmarks.{part}", *options, seconds=seconds)


def _run(module: str, *options: str, seconds: float | None) -> bool:
    """Run a module by itself: one that hangs or takes the GPU's memory along stops no other."""
    ended = run_isolated(
        [sys.executable, "-m", module, *options],
        limit_seconds=_NO_LIMIT_SECONDS if seconds is None else max(seconds, 1.0) + _GRACE_SECONDS,
        environment=_gpu_environment(),
        folder=ROOT,
        show=True,
    )
    if ended.fault:
        print(f"{module} {options[-1] if options else ''}: {ended.fault}", file=sys.stderr)
    return not ended.fault


if __name__ == "__main__":
    sys.exit(main())
