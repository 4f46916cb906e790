"""How much memory does a feed-forward block need on an H200, dense and with 2:4 sparse weights?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.nm_matmul_memory [--force]

Nothing runs: blocks of GPT-2 and Llama size, forward and backward, with the packing of both
weights, are compiled for the GPU. XLA says what they allocate, ptxas what the kernels spill.
"""

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.nm_matmul_functions import make_dense, make_sparse
from benchmarks.nm_matmul_problems import BLOCKS, Block, make_inputs
from benchmarks.records import Column, Results, make_table
from pallas_kernels import aot

TOKENS = 16384
VARIANTS = ("dense", "sparse", "sparse, MVUE")


def compile_block(
    block: Block, variant: str, mesh: jax.sharding.Mesh, *, tokens: int = TOKENS
) -> aot.AotReport:
    """Compile the forward and backward pass of a block.

    Args:
      block: Block.
      variant: "dense"; "sparse", all but dw by sparse tensor cores; or "sparse, MVUE", dw as well.
      mesh: from `aot.make_gpu_mesh`.
      tokens: int.

    Returns:
      AotReport.
    """
    problem = block.problem(
        tokens=tokens, grad_pruning="mvue" if variant == "sparse, MVUE" else "none"
    )
    inputs = jax.eval_shape(functools.partial(make_inputs, problem, 0, packs=True))
    dense = variant == "dense"
    function = make_dense(problem) if dense else make_sparse(problem, "mosaic_sm90")
    return aot.compile_for(function, inputs, mesh=mesh)


def summarise(report: aot.AotReport) -> dict[str, int]:
    """Return what a record keeps of a compiled block.

    Args:
      report: AotReport.

    Returns:
      dict of bytes and counts. `kernels` counts launches of Mosaic kernels, `sparse_instructions`
      HGMMA.SP in the programs of the different ones, `serialized_kernels` those of which ptxas
      made products wait for each other.
    """
    return {
        "argument_bytes": report.argument_bytes,
        "output_bytes": report.output_bytes,
        "temp_bytes": report.temp_bytes,
        "peak_bytes": report.peak_bytes,
        "kernels": len(re.findall(r"kernel_hash = ", report.hlo)),
        "sparse_instructions": sum(k.sass.count("HGMMA.SP") for k in report.kernels),
        "spill_bytes": sum(k.spill_bytes for k in report.kernels),
        "serialized_kernels": sum(k.is_serialized for k in report.kernels),
    }


def _gigabytes(variant, name):
    return lambda record: f"{record['values'][variant][name] / 1e9:.2f}"


def _count(name):
    def cell(record):
        values = (record["values"][variant][name] for variant in VARIANTS[1:])
        return " / ".join(map(str, values))

    return cell


def _ratio(record: Any) -> str:
    peaks = (record["values"][variant]["peak_bytes"] for variant in VARIANTS)
    dense, *sparse = peaks
    return " / ".join(f"{peak / dense:.2f}x" for peak in sparse)


COLUMNS = (
    Column("block", lambda r: r["key"]["name"]),
    Column("width x hidden", lambda r: "{width} x {hidden}".format(**r["key"])),
    Column("activation", lambda r: r["key"]["activation"]),
    Column("tokens", lambda r: str(r["key"]["tokens"])),
    Column("arguments, GB", _gigabytes("dense", "argument_bytes")),
    *(Column(f"{v}, temporaries, GB", _gigabytes(v, "temp_bytes")) for v in VARIANTS),
    *(Column(f"{v}, peak, GB", _gigabytes(v, "peak_bytes")) for v in VARIANTS),
    Column("peak, sparse / MVUE against dense", _ratio),
    Column("launches", _count("kernels")),
    Column("HGMMA.SP", _count("sparse_instructions")),
    Column("spilled bytes", _count("spill_bytes")),
    Column("serialized", _count("serialized_kernels")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the blocks that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if no kernel spills registers or is serialized.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--force", action="store_true", help="compile blocks already recorded")
    force = parser.parse_args(arguments).force
    results = Results(RESULTS / "nm_matmul_memory_h200.json")
    mesh = aot.make_gpu_mesh(aot.H200)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for block in BLOCKS:
        key = {**block._asdict(), "tokens": TOKENS}
        if key in results and not force:
            continue
        values = {name: summarise(compile_block(block, name, mesh)) for name in VARIANTS}
        results.record(key, values, environment)
        print(f"memory {key}", flush=True)
    table = make_table(results.records, COLUMNS)
    (RESULTS / "nm_matmul_memory_h200.md").write_text(table)
    print("\n" + table)
    faults = [
        value[name]
        for record in results.records
        for value in record["values"].values()
        for name in ("spill_bytes", "serialized_kernels")
    ]
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
