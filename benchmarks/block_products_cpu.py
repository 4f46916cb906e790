"""At what rate does a CPU multiply by one block of a weight, beside the whole weight?

    python -m benchmarks.block_products_cpu [--force] [--budget-seconds=N]

A loop of products [M, side] x [side, side] of operands that lie ready, each in a place of its own:
no slice is taken of a larger array, and nothing is gathered. "sliced" takes each from where it lies
in x [M, K] and w [K, N], as `block_sparse_matmul` does. Neither adds up what belongs together, so
that nothing but the products is timed.

Letters: M rows (tokens)   K contracted axis   N columns   P products of the loop.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels.doctor.timing import make_random

_INNER, _COLUMNS = 768, 3072
_SIDES = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting that is measured.

    Attributes:
      rows: int, M.
      side: int, of a block.
    """

    rows: int
    side: int

    @property
    def num_products(self) -> int:
        """P: as many as a tenth of the blocks of the weight."""
        return _INNER * _COLUMNS // (10 * self.side**2)


class Inputs(NamedTuple):
    """What every function is called with.

    Attributes:
      x: f32[M, K].
      w: f32[K, N].
      parts: f32[K / side, M, side], blocks of columns of x.
      blocks: f32[P, side, side].
    """

    x: jax.Array
    w: jax.Array
    parts: jax.Array
    blocks: jax.Array


def _multiply_ready(s: Inputs) -> jax.Array:
    def step(p, _):
        return jnp.dot(s.parts[p % s.parts.shape[0]], s.blocks[p])

    return jax.lax.fori_loop(0, s.blocks.shape[0], step, jnp.zeros(s.parts.shape[1:]))


def _multiply_sliced(s: Inputs) -> jax.Array:
    side = s.blocks.shape[1]

    def step(p, _):
        first = p % s.parts.shape[0] * side
        part = jax.lax.dynamic_slice_in_dim(s.x, first, side, axis=1)
        place = (first, p * side % (_COLUMNS - side))
        return jnp.dot(part, jax.lax.dynamic_slice(s.w, place, (side, side)))

    return jax.lax.fori_loop(0, s.blocks.shape[0], step, jnp.zeros(s.parts.shape[1:]))


_FUNCTIONS: dict[str, Callable[[Inputs], jax.Array]] = {
    "ready": _multiply_ready,
    "sliced": _multiply_sliced,
    "dense": lambda s: s.x @ s.w,
}


def _compute_last(s: Inputs, *, sliced: bool) -> jax.Array:
    """Return the last product of the loop."""
    last, side = s.blocks.shape[0] - 1, s.blocks.shape[1]
    block = s.blocks[last]
    if sliced:
        k, n = last % s.parts.shape[0] * side, last * side % (_COLUMNS - side)
        block = s.w[k : k + side, n : n + side]
    return jnp.dot(s.parts[last % s.parts.shape[0]], block, precision="highest")


def make_case(problem: Problem) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
    """
    rows, side, count = problem.rows, problem.side, problem.num_products

    def draw(seed, *shape):
        return make_random(jax.ShapeDtypeStruct(shape, "float32"), seed=seed)

    x, w = draw(0, rows, _INNER), draw(1, _INNER, _COLUMNS)
    parts = x.reshape(rows, -1, side).swapaxes(0, 1) + 0
    references: dict[str, Callable[..., Any]] = {
        "ready": functools.partial(_compute_last, sliced=False),
        "sliced": functools.partial(_compute_last, sliced=True),
        "dense": lambda s: jnp.dot(s.x, s.w, precision="highest"),
    }
    work = 2.0 * rows * count * side**2
    return Case(
        functions={name: lambda *s, f=f: f(Inputs(*s)) for name, f in _FUNCTIONS.items()},
        args=Inputs(x, w, parts, draw(2, count, side, side)),
        reference=lambda *s: None,
        references={name: lambda *s, f=f: f(Inputs(*s)) for name, f in references.items()},
        tolerance=1e-5,
        flops={"ready": work, "sliced": work, "dense": 2.0 * rows * _INNER * _COLUMNS},
    )


def list_problems() -> list[Problem]:
    """Return the points, small blocks first."""
    return [Problem(rows=2048, side=side) for side in _SIDES]


def _gflops(name: str) -> Callable[[Any], str]:
    return lambda record: f"{1e3 * record['values'][name]['tflops_per_second']:.0f}"


def _share(name: str) -> Callable[[Any], str]:
    def cell(record):
        values = record["values"]
        return f"{values[name]['tflops_per_second'] / values['dense']['tflops_per_second']:.2f}"

    return cell


COLUMNS = (
    Column("rows", lambda r: str(r["key"]["rows"])),
    Column("side", lambda r: str(r["key"]["side"])),
    *(Column(f"{name} GFLOP/s", _gflops(name)) for name in _FUNCTIONS),
    Column("ready, of dense", _share("ready")),
    Column("sliced, of dense", _share("sliced")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every function agreed with its reference.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    del parsed["headline"]
    points = [
        Point(key=dataclasses.asdict(p), make_case=functools.partial(make_case, p))
        for p in list_problems()
    ]
    failures = run_points("block_products_cpu", points, COLUMNS, limit_seconds=6.0, **parsed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
