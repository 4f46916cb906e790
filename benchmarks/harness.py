"""Time callables fairly: random data, check before timing, warm up, interleave, take medians.

A benchmark is a list of `Point`s. `run_points` measures those that its results file lacks, one
after the other, and writes each as soon as it is done, so that a run may be cut off anywhere and
called again.
"""

import argparse
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.environment import describe_environment, device_name
from benchmarks.records import Column, Key, Results, make_table

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


class Case(NamedTuple):
    """The callables that one point compares.

    Attributes:
      functions: name -> function of `args` returning a pytree of arrays; `run_points` jits them.
      args: tuple, what every function is called with; random data, never zeros.
      reference: the function that the others must agree with, evaluated once, not timed.
      tolerance: f32, largest relative error `|y - r| / |r|` (Frobenius norm, per leaf) allowed.
      flops: name -> floating-point operations of one call; gives TFLOP/s in the record.
      absent: name -> why a function that belongs here is not measured (a peer not installed).
    """

    functions: Mapping[str, Callable[..., Any]]
    args: tuple
    reference: Callable[..., Any]
    tolerance: float
    flops: Mapping[str, float] = {}
    absent: Mapping[str, str] = {}


class Point(NamedTuple):
    """One measurement: its settings and how to make its callables.

    Attributes:
      key: the settings, JSON scalars; the device's name is added to it.
      make_case: called only if the point must be measured.
    """

    key: Key
    make_case: Callable[[], Case]


def make_random(specs: Any, *, seed: int = 0) -> Any:
    """Make standard normal arrays.

    Zeros and constants must not be timed: a GPU draws less power on them and clocks higher.

    Args:
      specs: pytree of `jax.ShapeDtypeStruct`, floating dtypes.
      seed: int, equal seeds give equal data.

    Returns:
      pytree of arrays shaped like `specs`.
    """
    leaves, treedef = jax.tree.flatten(specs)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    arrays = [
        jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, arrays)


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest relative error over the leaves of two pytrees.

    max over leaves of |actual - expected| / |expected|, Frobenius norms in f32.

    Args:
      actual: pytree of arrays.
      expected: pytree of arrays of the same structure and shapes.

    Returns:
      float; infinite if a leaf holds a NaN or an infinity where `expected` does not.

    Raises:
      ValueError: if structures or shapes differ.
    """
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ValueError(
            f"actual has the structure {jax.tree.structure(actual)}, expected one like "
            f"{jax.tree.structure(expected)}"
        )
    errors = [0.0]
    for y, r in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if y.shape != r.shape:
            raise ValueError(f"actual has a leaf of shape {y.shape}, expected {r.shape}")
        y, r = y.astype(jnp.float32), r.astype(jnp.float32)
        error = float(jnp.linalg.norm(y - r) / jnp.maximum(jnp.linalg.norm(r), 1e-30))
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    sample_seconds: float = 0.02,
    limit_seconds: float = 20.0,
) -> dict[str, list[float]]:
    """Time callables in turns, so that drift of the machine falls on all of them alike.

    Each round takes one sample of every callable; a sample is as many calls in a row as fill
    `sample_seconds`, dispatched without waiting in between. An untimed call goes before each
    sample: what a peer left behind (cold caches, a gigabyte of heap given back to the system) is
    not the callable's own cost. Every callable is run once before, to compile, and once more, to
    find how many calls fill a sample.

    Args:
      calls: name -> function without arguments, returning a pytree of arrays.
      repeats: int, rounds at most; at least 3 are taken.
      sample_seconds: float, seconds that one sample should last.
      limit_seconds: float, seconds after which no further round starts.

    Returns:
      dict name -> seconds per call, one number per round.
    """
    calls_per_sample = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
        calls_per_sample[name] = max(1, math.ceil(sample_seconds / max(once, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for round_index in range(max(repeats, 3)):
        if round_index >= 3 and time.perf_counter() - began > limit_seconds:
            break
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(calls_per_sample[name]):
                result = call()
            jax.block_until_ready(result)
            samples[name].append((time.perf_counter() - start) / calls_per_sample[name])
    return samples


def measure_case(case: Case, **timing: Any) -> dict[str, dict[str, Any]]:
    """Check every function of a case against its reference, then time those that agree.

    Args:
      case: the functions to compare.
      **timing: options of `time_interleaved`.

    Returns:
      dict name -> `median_seconds`, `min_seconds`, `max_seconds`, `rounds`, `relative_error`,
      `temp_bytes` (XLA's temporary memory), `tflops_per_second` if its FLOPs are known; or
      `failed`, why it was not timed, or `absent`.
    """
    expected = jax.jit(case.reference)(*case.args)
    values: dict[str, dict[str, Any]] = {
        name: {"absent": reason} for name, reason in case.absent.items()
    }
    calls = {}
    for name, function in case.functions.items():
        compiled = jax.jit(function).lower(*case.args).compile()
        error = relative_error(compiled(*case.args), expected)
        values[name] = {"relative_error": float(f"{error:.3g}")}
        if error > case.tolerance:
            values[name] = {"failed": f"relative error {error:.3g} > {case.tolerance:g}"}
            continue
        memory = compiled.memory_analysis()
        values[name]["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
        calls[name] = lambda compiled=compiled: compiled(*case.args)
    for name, seconds in time_interleaved(calls, **timing).items():
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


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line that every benchmark shares.

    Args:
      description: one sentence for `--help`.
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      Namespace with `force` and `budget_seconds`, keyword arguments of `run_points`, and
      `headline`, for the benchmark to choose its points by.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--force", action="store_true", help="measure points already recorded")
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="start no point after this time"
    )
    parser.add_argument(
        "--headline", action="store_true", help="measure only the points that `make gpu` measures"
    )
    return parser.parse_args(arguments)
