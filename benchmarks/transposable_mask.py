"""How fast is the search for transposable 2:4 masks, in Triton and in XLA?

    python -m benchmarks.transposable_mask [--headline] [--force] [--budget-seconds=N]

Both must choose the same masks. One call searches several weights, on a GPU at least eight and as
many as do not fit in its cache: neither that nor the launch of a call is what is timed.

Letters: K N as in `transposable_mask`.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.records import Column, Results
from benchmarks.targets import Record, Target, evaluate, seconds_of
from pallas_kernels import choose_implementation, transposable_mask
from pallas_kernels.doctor.timing import make_random
from pallas_kernels.transposable_mask.call import TransposableFacts

TRITON, XLA = "triton", "xla"
_RING_BYTES = 128 * 10**6
_MIN_SEARCHED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting that is measured.

    Attributes:
      rows: int, K.
      columns: int, N.
    """

    rows: int
    columns: int
    dtype: str

    def key(self) -> dict[str, Any]:
        """Return what the point is recorded under.

        Returns:
          dict of settings.
        """
        return dataclasses.asdict(self)

    @property
    def moved_bytes(self) -> int:
        """Bytes of the weight and of its mask."""
        return self.rows * self.columns * (jnp.dtype(self.dtype).itemsize + 1)

    def count_weights(self) -> int:
        """Return how many weights a call searches on a GPU.

        Returns:
          int, at least 8.
        """
        return max(_MIN_SEARCHED, math.ceil(_RING_BYTES / self.moved_bytes))


def make_search(implementation: Any) -> Callable[..., list[jax.Array]]:
    """Make the function of several weights.

    Args:
      implementation: of `transposable_mask`.

    Returns:
      function of any number of weights to the list of their masks.
    """

    def search(*weights):
        return [transposable_mask(w, implementation=implementation) for w in weights]

    return search


def share_of_different_entries(actual: Any, expected: Any) -> float:
    """Return the largest share of entries that differ, over several masks.

    Args:
      actual: list of bool arrays.
      expected: list of bool arrays of the same shapes.

    Returns:
      float in [0, 1].
    """
    return max(float((a != e).mean()) for a, e in zip(actual, expected, strict=True))


def make_case(problem: Problem) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
    """
    on_cpu = jax.default_backend() == "cpu"
    count = 1 if on_cpu else problem.count_weights()
    struct = jax.ShapeDtypeStruct((problem.rows, problem.columns), problem.dtype)
    names, absent = [TRITON, XLA], {}
    try:
        facts = TransposableFacts(**problem.key())
        choose_implementation("transposable_mask", facts, TRITON)
    except NotImplementedError as reason:
        names, absent = [XLA], {TRITON: str(reason)}
    return Case(
        functions={name: make_search(name) for name in names},
        args=tuple(make_random(struct, seed=seed) for seed in range(count)),
        reference=make_search(XLA),
        tolerance=0.0,
        error=share_of_different_entries,
        absent=absent,
        units=count,
    )


_HEADLINE = Problem(rows=4096, columns=4096, dtype="bfloat16")


def headline_problems(platform: str) -> list[Problem]:
    """Return the points that tell most, the most important first.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    masters = dataclasses.replace(_HEADLINE, dtype="float32")
    return [masters] if platform == "cpu" else [_HEADLINE, masters]


def sweep_problems(platform: str) -> list[Problem]:
    """Return the headline points and all that lie behind them.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    behind = [
        Problem(rows=rows, columns=columns, dtype=dtype)
        for rows, columns in ((768, 3072), (1280, 5120), (4096, 14336), (8192, 28672))
        for dtype in ("float32", "bfloat16")
    ]
    return headline_problems(platform) + ([] if platform == "cpu" else behind)


def _microseconds(name: str) -> Callable[[Record], str]:
    return lambda record: f"{1e6 * seconds_of(record, name):.3g}"


def _bandwidth(record: Record) -> str:
    rate = Problem(**_settings(record)).moved_bytes / seconds_of(record, TRITON)
    return f"{rate / 1e12:.3g}"


def _settings(record: Record) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(Problem)}
    return {name: value for name, value in record["key"].items() if name in names}


COLUMNS = (
    Column("K x N", lambda r: "{rows} x {columns}".format(**r["key"])),
    Column("dtype", lambda r: r["key"]["dtype"]),
    Column("Triton us", _microseconds(TRITON), optional=True),
    Column("xla us", _microseconds(XLA)),
    Column("Triton TB/s", _bandwidth, optional=True),
)


def _on_h200(record: Record) -> float | None:
    if _settings(record) != _HEADLINE.key() or "H200" not in record["key"]["device"]:
        return None
    return record["values"].get(TRITON, {}).get("median_seconds")


TARGETS = (
    Target(
        "Triton searches 4096 x 4096 weights in bf16 in at most 100 us on an H200",
        _on_h200,
        lambda seconds: seconds <= 100e-6,
        worst=max,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print table and targets.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if both chose the same masks. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    choose_problems = headline_problems if parsed.pop("headline") else sweep_problems
    points = [
        Point(key=problem.key(), make_case=functools.partial(make_case, problem))
        for problem in choose_problems(jax.default_backend())
    ]
    failures = run_points("transposable_mask", points, COLUMNS, **parsed)
    print(evaluate(TARGETS, Results(RESULTS / "transposable_mask.json").records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
