"""Which tiles make the sparse kernel fastest? Candidates timed one beside another on a Hopper GPU.

    python -m benchmarks.nm_matmul_tiles [--force] [--budget-seconds=N]

Each point is one product of the kernel, R x C x P as in
`pallas_kernels/nm_matmul/mosaic_sm90/tile_config.py`, with every way of cutting it that fits a GPU.
What comes out, printed and below the table, are rows for `TUNED` of that file.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.nm_matmul import choose_kernels
from benchmarks.nm_matmul_functions import activate, on_every_set
from benchmarks.nm_matmul_problems import BLOCKS, Inputs, Problem, make_inputs
from benchmarks.nm_matmul_report import HOPPER
from benchmarks.records import Column, Results
from benchmarks.targets import Record
from pallas_kernels.dispatch import count_processors
from pallas_kernels.hopper.budget import SHARED_MEMORY_BYTES
from pallas_kernels.nm_matmul.mosaic_sm90 import cut
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Tiles, count_shared_bytes
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import count_most_columns, default_config

_MAX_STAGES = 6
DEFAULT = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product out[P, R] = (A[R, C] B[C, P])^T of the kernel, A sparse.

    Attributes:
      rows: int, R: N of y = x w, K of dx = dz w^T, N of dw = x^T S(dz).
      contraction: int, C: K, N, and the tokens.
      columns: int, P: tokens, tokens, and K.
      activation: str or None; of a gated one, half of R are gates.
      dense_is_transposed: bool, B is given as [P, C]; not so for dw alone.
    """

    rows: int
    contraction: int
    columns: int
    activation: str | None = None
    dense_is_transposed: bool = True
    dtype: str = "bfloat16"

    def key(self) -> dict[str, Any]:
        """Return what the point is recorded under.

        Returns:
          dict of settings; the activation only where there is one.
        """
        key = dataclasses.asdict(self)
        return {name: value for name, value in key.items() if value is not None}

    def as_kernel_problem(self) -> cut.Problem:
        """Return the product as the kernel takes it.

        Returns:
          Problem of `mosaic_sm90.cut`.
        """
        return cut.Problem(
            **dataclasses.asdict(self),
            # What the backward pass needs is written with the result, as in training.
            keeps_inputs=self.activation is not None,
        )

    @property
    def is_gated(self) -> bool:
        """Whether half of the rows gate the other half."""
        return self.as_kernel_problem().is_gated


def list_products() -> list[Product]:
    """Return the products of the headline points, the largest model's first.

    Returns:
      list of Product, none twice.
    """
    tokens = 16384
    products = [Product(rows=size, contraction=size, columns=size) for size in (4096, 8192, 2048)]
    for block in reversed(BLOCKS):
        up = block.problem().up_columns
        k, hidden = block.width, block.hidden
        products += [
            Product(rows=up, contraction=k, columns=tokens, activation=block.activation),
            Product(rows=k, contraction=hidden, columns=tokens),
            # The gradient of the input of each of the two.
            Product(rows=k, contraction=up, columns=tokens),
            Product(rows=hidden, contraction=k, columns=tokens),
            # And of each weight.
            Product(rows=up, contraction=tokens, columns=k, dense_is_transposed=False),
            Product(rows=k, contraction=tokens, columns=hidden, dense_is_transposed=False),
        ]
    return list(dict.fromkeys(products))


def list_candidates(product: Product) -> list[Tiles]:
    """List the ways of cutting a product that the kernel takes and that fit a GPU.

    Returns:
      list of Tiles, as many stages each as fit; the order of tiles is varied for wide ones only.
    """
    problem = product.as_kernel_problem()
    candidates = []
    cuts = itertools.product(
        (2,) if product.is_gated else (1, 2),
        (256, 224, 192, 160, 128, 96, 64),
        (64, 128),
        (8, 4, 16),
        (2, 1),
    )
    for blocks, width, contraction, group, cluster in cuts:
        most = count_most_columns(product.activation)
        if not 128 <= blocks * width <= most or width > product.columns:
            continue
        if product.contraction % contraction or (group != 8 and blocks * width < 256):
            continue
        fitting = [
            tiles
            for stages in range(2, _MAX_STAGES + 1)
            if count_shared_bytes(
                problem, tiles := Tiles(blocks, width, contraction, stages, cluster, group)
            )
            <= SHARED_MEMORY_BYTES
        ]
        candidates += fitting[-1:]
    return candidates


def name_tiles(tiles: Tiles) -> str:
    """Write tiles as the name of a function.

    Returns:
      str, "blocks-columns-contraction-stages-cluster-group-in_flight".
    """
    return "-".join(str(value) for value in dataclasses.astuple(tiles))


def read_tiles(name: str) -> Tiles:
    """Read what `name_tiles` wrote."""
    return Tiles(*(int(value) for value in name.split("-")))


def make_function(product: Product, tiles: Tiles, *, num_programs: int) -> Any:
    """Make the product with given tiles.

    Args:
      num_programs: int, processors of the GPU.

    Returns:
      function of Inputs, whose `d_out` is the dense operand and whose `packed.along_k` is A.
    """
    problem = product.as_kernel_problem()

    def multiply(s: Inputs):
        options = {"num_programs": num_programs}
        return multiply_sparse(s.packed.along_k, s.d_out, None, problem, tiles, **options)

    return multiply


def make_product_inputs(product: Product, seed: int) -> Inputs:
    """Make the operands of a product.

    Returns:
      Inputs with `packed`, w and mask of A^T, and the dense operand as `d_out`.
    """
    problem = _as_problem(product)
    inputs = make_inputs(problem, seed, packs=True)
    dense = inputs.x if product.dense_is_transposed else inputs.x.T
    return inputs._replace(x=None, d_out=dense)


def make_case(product: Product, *, num_programs: int) -> Case:
    """Make the functions that one point compares.

    Args:
      num_programs: int, processors of the GPU.

    Returns:
      Case with a function for every candidate, and one more for what `default_config` chooses.
    """
    default = default_config(
        product.rows,
        product.contraction,
        product.columns,
        product.dtype,
        num_programs=num_programs,
        activation=product.activation,
    )
    problem = product.as_kernel_problem()

    def reference(s: Inputs):
        dense = s.d_out if product.dense_is_transposed else s.d_out.T
        z = dense.astype("float32") @ (s.w * s.mask).astype("float32")
        results = [activate(z, product.activation)]
        return results + [z] if problem.keeps_inputs else results

    make = jax.jit(make_product_inputs, static_argnums=0)
    sets = tuple(make(product, seed) for seed in range(_as_problem(product).count_sets()))
    candidates = [default, *list_candidates(product)]
    names = {DEFAULT: default, **{name_tiles(tiles): tiles for tiles in candidates}}
    return Case(
        functions={
            name: on_every_set(make_function(product, tiles, num_programs=num_programs))
            for name, tiles in names.items()
        },
        args=sets,
        reference=on_every_set(reference),
        tolerance=2e-2,
        flops=dict.fromkeys(names, 2.0 * product.rows * product.contraction * product.columns),
        units=len(sets),
    )


def _as_problem(product: Product) -> Problem:
    return Problem(
        measure="gemm",
        rows=product.columns,
        inner=product.contraction,
        columns=product.rows,
        dtype=product.dtype,
    )


def find_fastest(record: Record) -> str | None:
    """Return the name of the fastest candidate.

    Args:
      record: of one point.

    Returns:
      str, or None if none was timed.
    """
    seconds = {
        name: value["median_seconds"]
        for name, value in record["values"].items()
        if name != DEFAULT and "median_seconds" in value
    }
    return min(seconds, key=lambda name: seconds[name], default=None)


def describe_tuned(records: Sequence[Record]) -> str:
    """Write the rows of `tile_config.TUNED`.

    Args:
      records: of all devices.

    Returns:
      str in Markdown, empty if nothing was measured. Where a gradient of a weight has the key of
      another product, the row of that product, which comes first, is kept.
    """
    rows: dict[tuple[Any, ...], str] = {}
    for record in records:
        key = dict(record["key"])
        del key["device"]
        product, name = Product(**key), find_fastest(record)
        if name is not None:
            place = (product.rows, product.contraction, product.columns, product.is_gated)
            rows.setdefault(place, repr(read_tiles(name)))
    if not rows:
        return ""
    lines = "".join(f"{place}: {tiles},\n" for place, tiles in rows.items())
    where = "`pallas_kernels/nm_matmul/mosaic_sm90/tile_config.py`"
    return f"\nRows for `TUNED` in {where}:\n\n```python\n{lines}```\n"


def _rate(name):
    def cell(record):
        name_found = find_fastest(record) if name is None else name
        return (
            None
            if name_found is None
            else (f"{record['values'][name_found]['tflops_per_second']:.0f}")
        )

    return cell


COLUMNS = (
    Column("R x C x P", lambda r: "{rows} x {contraction} x {columns}".format(**r["key"])),
    Column("activation", lambda r: r["key"].get("activation")),
    Column("dense operand", lambda r: "P x C" if r["key"]["dense_is_transposed"] else "C x P"),
    Column("fastest: blocks-columns-contraction-stages-cluster-group-in_flight", find_fastest),
    Column("its TFLOP/s", _rate(None)),
    Column("TFLOP/s of the default", _rate(DEFAULT)),
    Column("candidates", lambda r: str(len(r["values"]) - 1)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the products that are missing; write and print the table and the rows of `TUNED`.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every candidate agreed with its reference, 2 without a Hopper GPU.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    del parsed["headline"]
    if HOPPER not in choose_kernels(jax.devices()[0])[0]:
        print(f"tiles are timed on a Hopper GPU, found {jax.devices()[0]}", file=sys.stderr)
        return 2
    points = [
        Point(
            key=product.key(),
            make_case=functools.partial(make_case, product, num_programs=count_processors()),
        )
        for product in list_products()
    ]
    failures = run_points("nm_matmul_tiles", points, COLUMNS, **parsed)
    tuned = describe_tuned(Results(RESULTS / "nm_matmul_tiles.json").records)
    with (RESULTS / "nm_matmul_tiles.md").open("a") as table:
        table.write(tuned)
    print(tuned)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
