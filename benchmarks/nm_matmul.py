"""How fast are 2:4 sparse products, their packing and whole FFNs beside dense ones?

    python -m benchmarks.nm_matmul [--headline] [--force] [--budget-seconds=N]

Every function of a point is checked before it is timed, sparse ones against the reference in f32,
dense ones, which multiply by the whole weight, against themselves in f32. Rates are effective: the
operations of the dense product over the time.

Operands of less than 128 MB would stay in the cache of a GPU. There one call works on several sets
of inputs, as many as fill 128 MB, so that launching a call is not what is timed either.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.nm_matmul_functions import (
    in_full_precision,
    make_dense,
    make_error,
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
    XLA,
    evaluate_targets,
)
from benchmarks.nm_matmul_torch import CUSPARSELT, make_torch_calls
from benchmarks.records import Results
from pallas_kernels import Implementation


def choose_kernel(device: Any) -> tuple[Implementation, dict[str, str]]:
    """Choose the implementation that is measured on a device.

    Returns:
      (name, why the Hopper kernel is absent if it is); no reason on a CPU.
    """
    if device.platform == "cpu":
        return XLA, {}
    if device.compute_capability.startswith("9."):
        return HOPPER, {}
    return XLA, {HOPPER: f"needs compute capability 9, found {device.compute_capability}"}


def make_case(problem: Problem, *, kernel: Implementation, on_cpu: bool) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
      kernel: "mosaic_sm90" or "xla".
      on_cpu: bool, where there is no cache to defeat and no cuSPARSELt.
    """
    count = 1 if on_cpu else problem.count_sets()
    make = jax.jit(functools.partial(make_inputs, problem, packs=kernel == HOPPER))
    sets = tuple(make(seed) for seed in range(count))
    error, tolerance = make_error(problem)
    case = Case(
        functions={kernel: on_every_set(make_sparse(problem, kernel))},
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
    dense = make_dense(problem)
    names = (kernel, DENSE, CUSPARSELT)
    flops = problem.flops()
    assert flops is not None, "only packing has none"
    return case._replace(
        functions={**case.functions, DENSE: on_every_set(dense)},
        references={DENSE: on_every_set(in_full_precision(dense))},
        foreign=foreign,
        absent=absent,
        flops=dict.fromkeys(names, flops),
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
    kernel, absent = choose_kernel(device)

    def make(problem: Problem) -> Case:
        case = make_case(problem, kernel=kernel, on_cpu=device.platform == "cpu")
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
