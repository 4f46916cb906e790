"""How fast are products with block-sparse weights beside dense ones, and from which density on?

    python -m benchmarks.block_sparse_matmul [--headline] [--force] [--budget-seconds=N]

Sparse functions are checked against the reference in f32, dense ones, which multiply by the whole
weight, against themselves in f32. "train" is forward and backward: y, dx, and dw of the kept
blocks, dense all three. Rates count kept blocks only.

Letters: M tokens   K contracted axis   N columns   I x J blocks of the weight.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.environment import find_triton_refusal
from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.records import Column, Results
from benchmarks.targets import Record, Target, evaluate, times_faster
from pallas_kernels import block_sparse_matmul
from pallas_kernels.doctor.timing import make_random

HOPPER, TRITON, XLA, DENSE = "mosaic_sm90", "triton", "xla", "dense"

# Operands of less would be found in the 50 to 60 MB of cache that a GPU has.
_RING_BYTES = 128 * 10**6
_TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
# A name in a variable is no literal.
_MATMUL: Any = block_sparse_matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting that is measured.

    Attributes:
      measure: "forward", or "train": forward and backward.
      rows: int, M.
      inner: int, K.
      columns: int, N.
      block: int, side of a block.
      density: float, blocks kept of all, drawn at random.
    """

    measure: Literal["forward", "train"]
    rows: int
    inner: int
    columns: int
    block: int
    density: float
    dtype: str

    def key(self) -> dict[str, Any]:
        """Return what the point is recorded under.

        Returns:
          dict of settings.
        """
        return dataclasses.asdict(self)

    @property
    def grid(self) -> tuple[int, int]:
        """(I, J)."""
        return self.inner // self.block, self.columns // self.block

    def count_kept(self) -> int:
        """Return how many blocks are kept.

        Returns:
          int, at least 1.
        """
        return max(1, round(self.density * math.prod(self.grid)))

    def flops(self, *, dense: bool) -> float:
        """Return the work.

        Args:
          dense: bool, of all blocks instead of those kept.

        Returns:
          float, floating-point operations.
        """
        weights = self.inner * self.columns if dense else self.count_kept() * self.block**2
        return (2.0 if self.measure == "forward" else 6.0) * self.rows * weights

    def count_sets(self) -> int:
        """Return how many sets of inputs are used in turns, so that none is found in the cache.

        Returns:
          int, at most 24.
        """
        m, k, n = self.rows, self.inner, self.columns
        moved = jnp.dtype(self.dtype).itemsize * (m * k + k * n + m * n)
        return min(24, math.ceil(_RING_BYTES / moved))


class Inputs(NamedTuple):
    """One set of inputs.

    Attributes:
      x: [M, K].
      w: [K, N].
      mask: bool[I, J].
      dy: [M, N].
    """

    x: jax.Array
    w: jax.Array
    mask: jax.Array
    dy: jax.Array


def make_inputs(problem: Problem, seed: jax.typing.ArrayLike) -> Inputs:
    """Make random inputs; products are of order 1.

    Args:
      seed: int, may be traced.
    """
    m, k, n = problem.rows, problem.inner, problem.columns

    def draw(index, *shape):
        return make_random(jax.ShapeDtypeStruct(shape, problem.dtype), seed=4 * seed + index)

    size = math.prod(problem.grid)
    first = jnp.arange(size) < problem.count_kept()
    mask = jax.random.permutation(jax.random.key(4 * seed + 3), first).reshape(problem.grid)
    w = draw(1, k, n) / jnp.asarray(math.sqrt(k), problem.dtype)
    return Inputs(x=draw(0, m, k), w=w, mask=mask, dy=draw(2, m, n))


def make_function(problem: Problem, name: str) -> Callable[[Inputs], Any]:
    """Make what is timed, or what it must equal.

    Args:
      name: an implementation of `block_sparse_matmul`, "dense", or "dense_f32".

    Returns:
      function of Inputs to y, or to y, dx and dw.
    """

    def run(s: Inputs):
        if name == "dense_f32":
            s = Inputs(*(a if a.dtype == jnp.bool_ else a.astype(jnp.float32) for a in s))
        is_dense = name.startswith(DENSE)

        def multiply(x, w):
            return x @ w if is_dense else _MATMUL(x, w, s.mask, implementation=name)

        if problem.measure == "forward":
            return multiply(s.x, s.w)
        y, pull_back = jax.vjp(multiply, s.x, s.w)
        return y, *pull_back(s.dy)

    if name != "dense_f32":
        return run

    def precise(s: Inputs):
        # GPUs would otherwise round f32 operands to TF32.
        with jax.default_matmul_precision("highest"):
            return run(s)

    return precise


def make_case(problem: Problem, *, device: Any) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
      device: jax.Device; the Hopper kernels are measured on Hopper only.
    """
    on_cpu = device.platform == "cpu"
    absent, kernels = {}, [XLA]
    if not on_cpu and device.compute_capability.startswith("9."):
        kernels = [HOPPER]
    elif not on_cpu:
        absent[HOPPER] = f"needs compute capability 9, found {device.compute_capability}"
    refusal = None if on_cpu else find_triton_refusal()
    if refusal is not None:
        absent[TRITON] = refusal
    elif not on_cpu:
        kernels.append(TRITON)
    make = jax.jit(functools.partial(make_inputs, problem))
    first, *others = (make(seed) for seed in range(1 if on_cpu else problem.count_sets()))
    return Case(
        functions={name: make_function(problem, name) for name in (*kernels, DENSE)},
        args=(first,),
        more_args=[(inputs,) for inputs in others],
        reference=make_function(problem, "reference"),
        references={DENSE: make_function(problem, "dense_f32")},
        tolerance=_TOLERANCES[problem.dtype],
        flops={name: problem.flops(dense=name == DENSE) for name in (*kernels, DENSE)},
        absent=absent,
    )


_DENSITIES = (0.1, 0.05, 0.2, 0.5, 1.0)


def headline_problems(platform: str) -> list[Problem]:
    """Return the points that tell most, the most important first.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    if platform == "cpu":
        # Layers of GPT-2 124M, and of the small models that are trained on a CPU.
        layers = (
            (768, 3072, 64), (768, 2304, 64), (128, 512, 16), (128, 384, 16), (128, 512, 32),
            (128, 384, 32),
        )  # fmt: skip
        return [
            _train(2048, *layer, density, "float32") for layer in layers for density in _DENSITIES
        ]
    wide = [_train(8192, 4096, 4096, 128, density) for density in _DENSITIES]
    layers = ((4096, 4096, 64), (768, 3072, 64), (1600, 6400, 64), (4096, 14336, 128))
    problems = [*wide, *(_train(8192, *layer, 0.1) for layer in layers)]
    return problems[:1] + [dataclasses.replace(problems[0], measure="forward")] + problems[1:]


def sweep_problems(platform: str) -> list[Problem]:
    """Return the headline points and all that lie behind them.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    headline = headline_problems(platform)
    if platform == "cpu":
        return headline
    behind = [
        _train(tokens, *layer, block, density)
        for layer in ((768, 2304), (768, 3072), (1280, 5120), (4096, 4096), (4096, 14336))
        for tokens in (2048, 16384)
        for block in (64, 128)
        for density in _DENSITIES
    ]
    return list(dict.fromkeys([*headline, *behind]))


def _train(rows, inner, columns, block, density, dtype="bfloat16") -> Problem:
    return Problem(
        measure="train", rows=rows, inner=inner, columns=columns, block=block, density=density,
        dtype=dtype,
    )  # fmt: skip


def _milliseconds(name):
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.3g}"


def _tflops(name):
    return lambda record: f"{record['values'][name]['tflops_per_second']:.3g}"


def _ratio(name):
    def cell(record):
        ratio = times_faster(record, name, DENSE)
        return None if ratio is None else f"{ratio:.2f}x"

    return cell


COLUMNS = (
    Column("measure", lambda r: r["key"]["measure"]),
    Column("tokens", lambda r: str(r["key"]["rows"])),
    Column("K x N", lambda r: "{inner} x {columns}".format(**r["key"])),
    Column("block", lambda r: str(r["key"]["block"])),
    Column("density", lambda r: f"{r['key']['density']:g}"),
    Column("dtype", lambda r: r["key"]["dtype"]),
    *(
        Column(f"{title} ms", _milliseconds(name), optional=True)
        for title, name in (
            ("Hopper", HOPPER),
            ("Triton", TRITON),
            ("xla", XLA),
            ("dense", DENSE),
        )
    ),
    Column("Hopper TFLOP/s", _tflops(HOPPER), optional=True),
    Column("Triton TFLOP/s", _tflops(TRITON), optional=True),
    Column("xla TFLOP/s", _tflops(XLA), optional=True),
    Column("dense TFLOP/s", _tflops(DENSE)),
    Column("Hopper against dense", _ratio(HOPPER), optional=True),
    Column("Triton against dense", _ratio(TRITON), optional=True),
    Column("xla against dense", _ratio(XLA), optional=True),
)


def _where(name: str, chosen: Callable[[dict[str, Any]], bool]) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        key = record["key"]
        return times_faster(record, name, DENSE) if chosen(key) else None

    return value


def _is_wide(key: dict[str, Any]) -> bool:
    sizes = key["inner"] >= 4096 and key["rows"] >= 8192
    return sizes and key["block"] == 128 and key["density"] == 0.1


TARGETS = (
    Target(
        "Hopper at least 4x cuBLAS at a tenth of the blocks of 128, 4096 wide, 8192 tokens or more",
        _where(HOPPER, _is_wide),
        lambda ratio: ratio >= 4.0,
    ),
    Target(
        "xla at least 2x dense on a CPU at a tenth of the blocks, forward and backward",
        _where(XLA, lambda key: key["density"] == 0.1 and key["dtype"] == "float32"),
        lambda ratio: ratio >= 2.0,
    ),
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
    points = [
        Point(key=problem.key(), make_case=functools.partial(make_case, problem, device=device))
        for problem in choose_problems(device.platform)
    ]
    failures = run_points("block_sparse_matmul", points, COLUMNS, limit_seconds=6.0, **parsed)
    print(evaluate(TARGETS, Results(RESULTS / "block_sparse_matmul.json").records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
