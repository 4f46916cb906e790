"""Can a CPU save time with 2:4 sparse weights?

    python -m benchmarks.nm_cpu [--force] [--budget-seconds=N]

Four ways to multiply by a weight that keeps two of every four consecutive values of a column:

  masked    the dense product of the masked weight, which is what `nm_matmul` does there
  unpacked  from packed values and positions; the weight is written out, then multiplied
  gathered  from packed values: for each of them the entry of x that it meets, no dense product
  bcoo      the sparse matrices of `jax.experimental.sparse`

beside the dense product of the whole weight. The last two keep a number for every row of x and
every kept weight, and are measured for few rows only.

Letters: M rows (tokens)   K contracted axis   N columns   G groups of four, K / 4.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.sparse
import jax.numpy as jnp

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from benchmarks.targets import times_faster
from pallas_kernels import nm_matmul
from pallas_kernels.doctor.timing import make_random

_SIZES = {"inner": 768, "columns": 3072}
_ROWS = (1, 8, 64, 2048)
_MOST_GATHERED = 8


class Inputs(NamedTuple):
    """What every function is called with.

    Attributes:
      x: f32[M, K].
      w: f32[K, N].
      mask: bool[K, N], two of every four consecutive weights of a column.
      values: f32[G, 2, N], what is kept.
      positions: int32[G, 2, N], in 0 to 3, where it was in its group.
      bcoo: BCOO f32[K, N].
    """

    x: jax.Array
    w: jax.Array
    mask: jax.Array
    values: jax.Array
    positions: jax.Array
    bcoo: jax.experimental.sparse.BCOO


def make_inputs(rows: int, inner: int, columns: int) -> Inputs:
    """Draw x, w and the positions that are kept.

    Args:
      rows: M.
      inner: K, a multiple of four.
      columns: N.
    """
    x = make_random(jax.ShapeDtypeStruct((rows, inner), "float32"), seed=0)
    w = make_random(jax.ShapeDtypeStruct((inner, columns), "float32"), seed=1) / inner**0.5
    drawn = jax.random.uniform(jax.random.key(2), (inner // 4, 4, columns))
    positions = jnp.sort(jnp.argsort(drawn, axis=1)[:, :2], axis=1)
    mask = (positions[:, :, None] == jnp.arange(4)[:, None]).any(axis=1)
    values = jnp.take_along_axis(w.reshape(drawn.shape), positions, axis=1)
    mask = mask.reshape(w.shape)
    bcoo = jax.experimental.sparse.BCOO.fromdense(jnp.where(mask, w, 0), nse=inner * columns // 2)
    return Inputs(x, w, mask, values, positions, bcoo)


def _multiply_unpacked(s: Inputs) -> jax.Array:
    at = s.positions[:, :, None] == jnp.arange(4)[:, None]
    w = jnp.where(at, s.values[:, :, None], 0).sum(axis=1)
    return s.x @ w.reshape(s.w.shape)


def _multiply_gathered(s: Inputs) -> jax.Array:
    x_MG4 = s.x.reshape(s.x.shape[0], -1, 4)

    def multiply(x_G4):
        x_G2N = jax.vmap(lambda x_4, at_2N: x_4[at_2N])(x_G4, s.positions)
        return (x_G2N * s.values).sum(axis=(0, 1))

    return jax.vmap(multiply)(x_MG4)


_FUNCTIONS: dict[str, Callable[[Inputs], Any]] = {
    "masked": lambda s: nm_matmul(s.x, s.w, s.mask, implementation="xla"),
    "unpacked": _multiply_unpacked,
    "gathered": _multiply_gathered,
    "bcoo": lambda s: s.x @ s.bcoo,
    "dense": lambda s: s.x @ s.w,
}
_OF_FEW_ROWS = ("gathered", "bcoo")


def make_case(rows: int) -> Case:
    """Make the functions that one point compares.

    Args:
      rows: M.
    """
    left_out = _OF_FEW_ROWS if rows > _MOST_GATHERED else ()
    work = 2 * rows * _SIZES["inner"] * _SIZES["columns"]
    return Case(
        functions={
            name: lambda *s, f=f: f(Inputs(*s))
            for name, f in _FUNCTIONS.items()
            if name not in left_out
        },
        args=make_inputs(rows, **_SIZES),
        reference=lambda *s: nm_matmul(*s[:3], implementation="reference"),
        references={"dense": lambda x, w, *_: jnp.dot(x, w, precision="highest")},
        tolerance=1e-5,
        flops={name: work if name == "dense" else work / 2 for name in _FUNCTIONS},
        absent=dict.fromkeys(left_out, f"keeps a number for every row and weight: {rows} rows"),
    )


def list_keys() -> list[dict[str, int]]:
    """Return what the points are recorded under.

    Returns:
      list of dict: rows, inner, columns.
    """
    return [{"rows": rows, **_SIZES} for rows in _ROWS]


def _milliseconds(name: str) -> Callable[[Any], str]:
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.3g}"


def _against_dense(name: str) -> Callable[[Any], str | None]:
    def cell(record):
        ratio = times_faster(record, name, "dense")
        return None if ratio is None else f"{ratio:.2f}x"

    return cell


COLUMNS = (
    Column("rows", lambda r: str(r["key"]["rows"])),
    Column("K x N", lambda r: "{inner} x {columns}".format(**r["key"])),
    *(Column(f"{name} ms", _milliseconds(name)) for name in _FUNCTIONS),
    *(
        Column(f"{name} against dense", _against_dense(name))
        for name in _FUNCTIONS
        if name != "dense"
    ),
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
        Point(key=key, make_case=functools.partial(make_case, key["rows"])) for key in list_keys()
    ]
    return 1 if run_points("nm_cpu", points, COLUMNS, limit_seconds=6.0, **parsed) else 0


if __name__ == "__main__":
    sys.exit(main())
