"""Check and time the callables of a benchmark, point by point, and keep what came out.

A benchmark is a list of `Point`s. `run_points` measures those that its results file lacks, one
after the other, and writes each as soon as it is done, so that a run may be cut off anywhere and
called again.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.environment import describe_environment, device_name
from benchmarks.records import Column, Key, Results, make_table
from pallas_kernels.doctor.timing import relative_error, time_interleaved

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


class ForeignCall(NamedTuple):
    """A callable that is not JAX's, on inputs of its own equal to those of the case.

    Attributes:
      call: function without arguments; its first call computes on the case's `args`.
      wait: function of what `call` returns, which returns when that has been computed.
      to_numpy: function of what `call` returns to a pytree like that of the reference.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    to_numpy: Callable[[Any], Any]


class Case(NamedTuple):
    """The callables that one point compares.

    Attributes:
      functions: name -> function of `args` returning a pytree of arrays; `run_points` jits them.
      args: tuple, what every function is called with; random data, never zeros.
      reference: the function that the others must agree with, evaluated once, not timed.
      tolerance: float, largest error allowed.
      references: name -> reference of a function that computes something else than the others.
      foreign: name -> callable of another framework, checked and timed like the functions.
      more_args: tuples like `args`; timed calls take them all in turns, so that small operands
        are not found in the cache by every call.
      flops: name -> floating-point operations of one unit; gives TFLOP/s in the record.
      absent: name -> why a function that belongs here is not measured (a peer not installed).
      error: function of a result and its reference to a float; by default the relative error
        `|y - r| / |r|` (Frobenius norm, largest of the leaves).
      units: int, one call does what is measured so many times; times and rates are those of one.
    """

    functions: Mapping[str, Callable[..., Any]]
    args: tuple
    reference: Callable[..., Any]
    tolerance: float
    references: Mapping[str, Callable[..., Any]] = {}
    foreign: Mapping[str, ForeignCall] = {}
    more_args: Sequence[tuple] = ()
    flops: Mapping[str, float] = {}
    absent: Mapping[str, str] = {}
    error: Callable[[Any, Any], float] = relative_error
    units: int = 1


class Point(NamedTuple):
    """One measurement: its settings and how to make its callables.

    Attributes:
      key: the settings, JSON scalars; the device's name is added to it.
      make_case: called only if the point must be measured.
    """

    key: Key
    make_case: Callable[[], Case]


def measure_case(case: Case, **timing: Any) -> dict[str, dict[str, Any]]:
    """Check every function of a case against its reference, then time those that agree.

    A function that raises has failed; what else the case holds is measured all the same. A
    foreign callable that raises is absent: what another framework cannot do is no fault here.

    Args:
      case: the functions to compare.
      **timing: options of `time_interleaved`.

    Returns:
      dict name -> `median_seconds`, `min_seconds`, `max_seconds`, `rounds`, `relative_error`,
      `temp_bytes` (XLA's temporary memory), `tflops_per_second` if its FLOPs are known; or
      `failed`, why it was not timed, or `absent`.
    """
    values: dict[str, dict[str, Any]] = {
        name: {"absent": reason} for name, reason in case.absent.items()
    }
    expected: dict[Callable[..., Any], Any] = {}

    def check(name: str, result: Any) -> bool:
        reference = case.references.get(name, case.reference)
        if reference not in expected:
            expected[reference] = jax.jit(reference)(*case.args)
        error = case.error(result, expected[reference])
        values[name] = {"relative_error": float(f"{error:.3g}")}
        if error > case.tolerance:
            values[name] = {"failed": f"error {error:.3g} > {case.tolerance:g}"}
        return error <= case.tolerance

    calls = {}
    for name, function in case.functions.items():
        try:
            compiled = jax.jit(function).lower(*case.args).compile()
            result = jax.block_until_ready(compiled(*case.args))
        except Exception as error:
            values[name] = {"failed": _describe(error)}
            continue
        if check(name, result):
            memory = compiled.memory_analysis()
            values[name]["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
            calls[name] = _call_in_turns(compiled, [case.args, *case.more_args])
    for name, foreign in case.foreign.items():
        try:
            result = foreign.to_numpy(foreign.call())
        except Exception as error:
            values[name] = {"absent": _describe(error)}
            continue
        if check(name, result):
            calls[name] = foreign.call
    # Gigabytes that the timed functions may need.
    expected.clear()
    timing["waits"] = {name: foreign.wait for name, foreign in case.foreign.items()}
    for name, seconds in time_interleaved(calls, **timing).items():
        seconds = [once / case.units for once in seconds]
        median = statistics.median(seconds)
        values[name] |= {
            "median_seconds": median,
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "rounds": len(seconds),
        }
        if name in case.flops:
            values[name]["tflops_per_second"] = case.flops[name] / median / 1e12
    return values


def _call_in_turns(function: Callable[..., Any], ring: Sequence[tuple]) -> Callable[[], Any]:
    turns = itertools.cycle(ring)
    return lambda: function(*next(turns))


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def run_points(
    name: str,
    points: Sequence[Point],
    columns: Sequence[Column],
    *,
    force: bool = False,
    budget_seconds: float = math.inf,
    results_dir: pathlib.Path = RESULTS,
    **timing: Any,
) -> int:
    """Measure the points that `results/<name>.json` lacks, then write and print its table.

    Points are keyed by their settings and the device. One with a failed function is measured
    again by the next run.

    Args:
      name: the benchmark; names `<name>.json` and `<name>.md`.
      points: what to measure, most important first.
      columns: of the table.
      force: measure points that are already there.
      budget_seconds: float, seconds after which no further point starts.
      results_dir: folder of the two files.
      **timing: options of `time_interleaved`.

    Returns:
      int, the number of functions that failed their check; 0 is success.
    """
    results = Results(results_dir / f"{name}.json")
    began, failures = time.perf_counter(), 0
    for index, point in enumerate(points):
        key = {**point.key, "device": device_name()}
        if key in results and not force and not _failures(results[key]["values"]):
            continue
        if time.perf_counter() - began > budget_seconds:
            print(f"{name}: time is up, {len(points) - index} points not looked at", flush=True)
            break
        values = measure_case(point.make_case(), **timing)
        results.record(key, values, describe_environment())
        failed = _failures(values)
        failures += len(failed)
        print(f"{name} {index + 1}/{len(points)} {_summary(point.key, values)}", flush=True)
    table = make_table(results.records, columns)
    (results_dir / f"{name}.md").write_text(table)
    print("\n" + table, flush=True)
    return failures


def _failures(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, value in values.items() if "failed" in value]


def _summary(key: Key, values: Mapping[str, Mapping[str, Any]]) -> str:
    settings = " ".join(f"{name}={value}" for name, value in key.items())

    def outcome(value: Mapping[str, Any]) -> str:
        if "median_seconds" in value:
            return f"{1e3 * value['median_seconds']:.3g} ms"
        return value.get("failed") or value.get("absent", "")

    return settings + ": " + ", ".join(f"{n} {outcome(v)}" for n, v in values.items())


def parse_arguments(
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    choices: Mapping[str, Sequence[str]] = {},
) -> argparse.Namespace:
    """Parse the command line that every benchmark shares.

    Args:
      description: one sentence for `--help`.
      arguments: list of str, `sys.argv[1:]` if None.
      choices: options of this benchmark alone: name -> values.

    Returns:
      Namespace with `force` and `budget_seconds`, keyword arguments of `run_points`, and
      `headline`, for the benchmark to choose its points by. An option of `choices` that is not
      given is None.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--force", action="store_true", help="measure points already recorded")
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="start no point after this time"
    )
    parser.add_argument(
        "--headline", action="store_true", help="measure only the points that `make gpu` measures"
    )
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, help="measure nothing else")
    return parser.parse_args(arguments)
