"""How fast are 2:4 sparse products, their packing and whole FFNs beside dense ones?

    python -m benchmarks.nm_matmul [--headline] [--force] [--budget-seconds=N]

Every function of a point is checked before it is timed, sparse ones against the reference in f32,
dense ones, which multiply by the whole weight, against XLA's product in f32. Rates are effective:
the operations of the dense product over the time.

Where "triton" is measured, products that are packed beforehand have one more dense rival: the same
kernel with the same tile, and no sparsity ("dense_triton").

Operands of less than 128 MB would stay in the cache of a GPU. There one call works on several sets
of inputs, as many as fill 128 MB, so that launching a call is not what is timed either.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.environment import find_triton_refusal
from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.nm_matmul_functions import (
    in_full_precision,
    make_dense,
    make_error,
    make_own_dense,
    make_sparse,
    on_every_set,
)
from benchmarks.nm_matmul_problems import (
    Problem,
    headline_problems,
    make_inputs,
    sweep_problems,
)
from benchmarks.nm_matmul_report import (
    COLUMNS,
    DENSE,
    HOPPER,
    OWN_DENSE,
    TRITON,
    XLA,
    evaluate_targets,
)
from benchmarks.nm_matmul_torch import CUSPARSELT, make_torch_calls
from benchmarks.records import Results
from pallas_kernels import Implementation


def choose_kernels(device: Any) -> tuple[tuple[Implementation, ...], dict[str, str]]:
    """Choose the implementations that are measured on a device.

    Returns:
      (names, at least one; why each kernel that is absent is). On a CPU there are no reasons.
    """
    if device.platform == "cpu":
        return (XLA,), {}
    kernels: list[Implementation] = []
    absent = {}
    if device.compute_capability.startswith("9."):
        kernels.append(HOPPER)
    else:
        absent[HOPPER] = f"needs compute capability 9, found {device.compute_capability}"
    refusal = find_triton_refusal()
    if refusal is None:
        kernels.append(TRITON)
    else:
        absent[TRITON] = refusal
    return tuple(kernels) or (XLA,), absent


def make_case(problem: Problem, *, kernels: Sequence[Implementation], on_cpu: bool) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
      kernels: of "mosaic_sm90", "triton" and "xla".
      on_cpu: bool, where there is no cache to defeat and no cuSPARSELt.
    """
    count = 1 if on_cpu else problem.count_sets()
    has_own_dense = problem.measure == "gemm" and TRITON in kernels
    packs = any(kernel != XLA for kernel in kernels)
    make = jax.jit(functools.partial(make_inputs, problem, packs=packs, turns=has_own_dense))
    sets = tuple(make(seed) for seed in range(count))
    error, tolerance = make_error(problem)
    case = Case(
        functions={kernel: on_every_set(make_sparse(problem, kernel)) for kernel in kernels},
        args=sets,
        reference=on_every_set(
            make_sparse(problem, XLA if problem.measure == "pack" else "reference")
        ),
        tolerance=tolerance,
        error=error,
        units=count,
    )
    if problem.measure == "pack":
        return case._replace(functions={**case.functions, XLA: case.reference})
    foreign, absent = {}, {}
    if not on_cpu and problem.measure in ("gemm", "gemm_with_packing"):
        foreign, absent = make_torch_calls(sets, packs=problem.measure != "gemm")
    dense = {DENSE: make_dense(problem)}
    precise = on_every_set(in_full_precision(dense[DENSE]))
    if has_own_dense:
        dense[OWN_DENSE] = make_own_dense(problem)
    functions = {**case.functions, **{name: on_every_set(f) for name, f in dense.items()}}
    flops = problem.flops()
    assert flops is not None, "only packing has none"
    return case._replace(
        functions=functions,
        references=dict.fromkeys(dense, precise),
        foreign=foreign,
        absent=absent,
        flops=dict.fromkeys((*functions, CUSPARSELT), flops),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print table and targets.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every function agreed with its reference. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    choose_problems = headline_problems if parsed.pop("headline") else sweep_problems
    device = jax.devices()[0]
    kernels, absent = choose_kernels(device)

    def make(problem: Problem) -> Case:
        case = make_case(problem, kernels=kernels, on_cpu=device.platform == "cpu")
        return case._replace(absent={**absent, **case.absent})

    points = [
        Point(key=problem.key(), make_case=functools.partial(make, problem))
        for problem in choose_problems(device.platform)
    ]
    failures = run_points("nm_matmul", points, COLUMNS, **parsed)
    records = Results(RESULTS / "nm_matmul.json").records
    print(evaluate_targets(records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
