"""What does the machine code of the Hopper kernels do in a step, and what do its threads hold?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.hopper_programs

Nothing runs: the kernels are compiled for an H200 and their programs read. A step is one tile of
the contraction of a product, or one tile of keys or queries of attention.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Column, Results, make_table
from pallas_kernels import (
    aot,
    block_sparse_attention,
    block_sparse_matmul,
    machine_code,
    mean_attention_map,
    pack_nm,
    products_in_flight,
)
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.packing import TILE, Compressed

NUM_PROCESSORS = aot.H200.cores
_HOPPER: Any = {"implementation": "mosaic_sm90"}


class Program(NamedTuple):
    """Something to compile.

    Attributes:
      function: of `args`.
      args: pytrees of `jax.ShapeDtypeStruct`.
      steps: int, steps of one turn of a loop.
    """

    name: str
    function: Callable[..., Any]
    args: tuple
    steps: int = 1


def _struct(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _sparse_product(name: str, tiles: Tiles, **options: Any) -> Program:
    size = 4096
    facts: dict[str, Any] = {"dtype": "bfloat16", "dense_is_transposed": True} | options
    problem = Problem(rows=size, contraction=size, columns=size, **facts)
    values: Any = _struct(size, size // 2)
    metadata: Any = _struct(size // TILE, size // TILE, 2 * TILE, dtype="uint32")
    bias = _struct(size) if problem.has_bias else None
    multiply = functools.partial(
        multiply_sparse, problem=problem, tiles=tiles, num_programs=NUM_PROCESSORS
    )
    args = (Compressed(values, metadata), _struct(size, size), bias)
    return Program(name, multiply, args, 1 + tiles.in_flight)


def _with_gradient(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return (differentiated arguments, others) -> value and gradients for a cotangent of ones."""

    def run(*args):
        value, pull_back = jax.vjp(lambda *first: function(*first, *args[count:]), *args[:count])
        return value, pull_back(jax.numpy.ones_like(value))

    return run


def _attention(head_dim: int, block: int, *, causal: bool) -> Program:
    length, x = 2048, _struct(2, 2048, 8, head_dim)
    attend = functools.partial(
        block_sparse_attention, block_q=block, block_kv=block, causal=causal, **_HOPPER
    )
    mask = _struct(1, 1, length // block, length // block, dtype="bool")
    name = f"attention, H={head_dim}, blocks of {block}" + ", causal" * causal
    return Program(name, _with_gradient(attend, 3), (x, x, x, mask))


def list_programs() -> Iterator[Program]:
    """List what is compiled."""
    yield _sparse_product("2:4 product", Tiles(1, 256, 64, 4))
    waiting = Tiles(1, 256, 64, 4, in_flight=0)
    yield _sparse_product("2:4 product, every group awaited", waiting)
    yield _sparse_product("2:4 product, steps of 128", Tiles(1, 256, 128, 2))
    yield _sparse_product(
        "2:4 product, B by columns", Tiles(1, 256, 64, 4), dense_is_transposed=False
    )
    yield _sparse_product(
        "2:4 product, bias, swiglu", Tiles(2, 128, 64, 4), activation="swiglu", has_bias=True
    )
    yield _sparse_product("2:4 product, clusters", Tiles(1, 256, 64, 4, cluster=2))
    yield _sparse_product("2:4 product, 256 x 192, clusters", Tiles(2, 192, 64, 4, cluster=2))
    yield _attention(64, 64, causal=True)
    yield _attention(128, 128, causal=False)
    matmul = functools.partial(block_sparse_matmul, **_HOPPER)
    mask = _struct(32, 32, dtype="bool")
    args = (_struct(8192, 4096), _struct(4096, 4096), mask)
    yield Program("block-sparse product, blocks of 128", _with_gradient(matmul, 2), args)
    x, lse = _struct(4, 2048, 8, 128), _struct(4, 2048, 8, dtype="float32")
    mean_map = functools.partial(mean_attention_map, causal=True, **_HOPPER)
    yield Program("mean map, H=128, causal", lambda q, k, lse: mean_map(q, k, lse=lse), (x, x, lse))
    pack = functools.partial(pack_nm, axis="both", **_HOPPER)
    yield Program(
        "packing, both axes", pack, (_struct(1600, 6400), _struct(1600, 6400, dtype="bool"))
    )


def describe(kernel: aot.KernelReport, steps: int) -> dict[str, Any]:
    """Return what a record keeps of a kernel.

    Args:
      steps: int, steps of one turn of a loop.

    Returns:
      dict: `registers`, the highest that a thread names, `spill_bytes`, `remarks` of ptxas, and for
      each innermost loop with products, of one step: `products`, `groups` and `instructions`.
    """
    program = machine_code.parse(kernel.sass)
    named = [int(n) for n in re.findall(r"(?<![A-Z])R(\d+)\b", kernel.sass)]
    loops = products_in_flight.find_loops(program)
    return {
        "registers": max(named, default=-1) + 1,
        "spill_bytes": kernel.spill_bytes,
        "remarks": len(kernel.remarks),
        "loops": [
            {
                "products": loop.products / steps,
                "groups": loop.groups / steps,
                "instructions": loop.instructions / steps,
            }
            for loop in loops
        ],
    }


def _of_loops(name: str) -> Callable[[Any], str | None]:
    def cell(record: Any) -> str | None:
        loops = record["values"]["kernel"]["loops"]
        return " / ".join(f"{loop[name]:g}" for loop in loops) or None

    return cell


TABLE = (
    Column("program", lambda r: r["key"]["program"]),
    Column("kernel", lambda r: r["key"]["kernel"]),
    Column("registers", lambda r: str(r["values"]["kernel"]["registers"])),
    Column("spilled bytes", lambda r: str(r["values"]["kernel"]["spill_bytes"])),
    Column("tensor-core instructions a step", _of_loops("products")),
    Column("groups a step", _of_loops("groups")),
    Column("instructions a step", _of_loops("instructions")),
    Column("remarks of ptxas", lambda r: str(r["values"]["kernel"]["remarks"])),
)


def main() -> int:
    """Compile all programs, write and print the table.

    Returns:
      int, exit code: 0 if no kernel spills registers and ptxas remarks nothing.
    """
    path = RESULTS / "hopper_programs.json"
    path.unlink(missing_ok=True)
    results = Results(path)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for program in list_programs():
        for kernel in aot.compile_for(program.function, *program.args).kernels:
            key = {"program": program.name, "kernel": kernel.name.rpartition("_")[0]}
            results.record(key, {"kernel": describe(kernel, program.steps)}, environment)
    table = make_table(results.records, TABLE)
    (RESULTS / "hopper_programs.md").write_text(table)
    print(table)
    kernels = [record["values"]["kernel"] for record in results.records]
    return 1 if any(kernel["spill_bytes"] or kernel["remarks"] for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
