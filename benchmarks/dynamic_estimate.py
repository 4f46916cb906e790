"""What would choosing attention blocks cost on an H200, by the program that is compiled for it?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.dynamic_estimate

A prediction, of the sizes of `benchmarks.dynamic_cost` in bfloat16: every kernel of "choose" takes
two microseconds to begin and reads and writes its operands at the memory's rate; attention,
forward, does the kept work at half the rate of dense tensor cores. Nothing is run.
"""

import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.dynamic_cost import DENSITY, HEADS, LENGTH, SETTINGS, WIDTH, make_case
from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Column, Results, make_table
from pallas_kernels.aot import H200, compile_for

NAME, BATCHES = "dynamic_estimate_h200", (1, 32)
# Of NVIDIA's data sheet, dense bfloat16; and what kernels that hide the memory reach of it.
_PEAK_FLOPS, _REACHED = 989e12, 0.5
_LAUNCH_SECONDS = 2e-6
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KERNELS = ("fusion", "custom-call", "sort", "copy", "dot", "reduce", "scatter", "gather")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)", re.MULTILINE)


def count_kernels(hlo: str) -> tuple[int, int]:
    """Count the kernels of a compiled program and the bytes that they read and write.

    Args:
      hlo: text of the optimized program, whose loops, if any, count once.

    Returns:
      tuple of kernels and bytes. Scratch memory of products, which they return as s8, counts as
      nothing.
    """
    sizes: dict[str, int] = {}
    num_kernels = num_bytes = 0
    entry = hlo[hlo.index("ENTRY") :]
    for name, types, operation, rest in _INSTRUCTION.findall(entry):
        sizes[name] = _count_bytes(types)
        if operation in _KERNELS:
            operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
            num_kernels += 1
            num_bytes += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return num_kernels, num_bytes


def estimate(block: int, spacing: int, batch: int) -> dict[str, Any]:
    """Compile the choice for an H200 and predict its time, and that of the attention it serves.

    Args:
      block: side of a block, positions.
      spacing: positions between sampled queries; 0 = none are sampled.
      batch: examples.
    """
    case = make_case(block, spacing)
    q, k, v, kept, budget = case.args

    def struct(x):
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.bfloat16)

    options = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(budget)]
    budget = jax.tree.unflatten(jax.tree.structure(budget), options)
    compiled = compile_for(case.functions["choose"], *map(struct, (q, k, v)), None, budget)
    num_kernels, num_bytes = count_kernels(compiled.hlo)
    # Two products of queries and keys, a multiplication and an addition each; half is visible.
    flops = 4 * batch * HEADS * WIDTH * LENGTH**2 / 2 * DENSITY
    return {
        "kernels": num_kernels,
        "bytes": num_bytes,
        "choose_seconds": num_kernels * _LAUNCH_SECONDS + num_bytes / H200.memory_bytes_per_second,
        "attend_seconds": _LAUNCH_SECONDS + flops / (_REACHED * _PEAK_FLOPS),
    }


def _count_bytes(types: str) -> int:
    total = 0
    for dtype, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types):
        if dtype == "s8":
            continue
        count = functools.reduce(lambda n, side: n * int(side), filter(None, sides.split(",")), 1)
        total += count * _BYTES[dtype]
    return total


COLUMNS = (
    Column("examples", lambda r: str(r["key"]["batch"])),
    Column("blocks of", lambda r: str(r["key"]["block"])),
    Column("a sample every", lambda r: str(r["key"]["spacing"] or "none")),
    Column("kernels", lambda r: str(r["values"]["kernels"])),
    Column("MB read and written", lambda r: f"{r['values']['bytes'] / 1e6:.1f}"),
    Column("choose, µs", lambda r: f"{1e6 * r['values']['choose_seconds']:.0f}"),
    Column("attend, µs", lambda r: f"{1e6 * r['values']['attend_seconds']:.0f}"),
    Column(
        "choose / attend",
        lambda r: f"{r['values']['choose_seconds'] / r['values']['attend_seconds']:.0%}",
    ),
)


def main() -> None:
    """Estimate every setting, and write records and table."""
    results = Results(RESULTS / f"{NAME}.json")
    for batch in BATCHES:
        for block, spacing in SETTINGS:
            key = {"batch": batch, "block": block, "spacing": spacing}
            environment = describe_environment() | {"device": f"{H200.name}, predicted"}
            results.record(key, estimate(block, spacing, batch), environment)
    table = make_table(results.records, COLUMNS)
    (RESULTS / f"{NAME}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    sys.exit(main())
