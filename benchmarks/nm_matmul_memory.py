"""How much memory does a feed-forward block need on an H200, dense and with 2:4 sparse weights?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.nm_matmul_memory [--force]

Nothing runs: blocks of GPT-2 and Llama size, forward and backward, with the packing of both
weights, are compiled for the GPU. XLA says what they allocate, ptxas what the kernels spill.
"""

import functools
import sys
from collections.abc import Sequence

import jax

from benchmarks.compiled import counts, gigabytes, ratios, run_compilations
from benchmarks.nm_matmul_functions import make_dense, make_sparse
from benchmarks.nm_matmul_problems import BLOCKS, Block, make_inputs
from benchmarks.records import Column, Key
from pallas_kernels import aot

TOKENS = 16384
VARIANTS = ("dense", "sparse", "sparse, MVUE")


def compile_block(
    block: Block, variant: str, mesh: jax.sharding.Mesh, *, tokens: int = TOKENS
) -> aot.AotReport:
    """Compile the forward and backward pass of a block.

    Args:
      variant: "dense"; "sparse", all but dw by sparse tensor cores; or "sparse, MVUE", dw as well.
      mesh: from `aot.make_gpu_mesh`.
    """
    problem = block.problem(
        tokens=tokens, grad_pruning="mvue" if variant == "sparse, MVUE" else "none"
    )
    inputs = jax.eval_shape(functools.partial(make_inputs, problem, 0, packs=True))
    dense = variant == "dense"
    function = make_dense(problem) if dense else make_sparse(problem, "mosaic_sm90")
    return aot.compile_for(function, inputs, mesh=mesh)


COLUMNS = (
    Column("block", lambda r: r["key"]["name"]),
    Column("width x hidden", lambda r: "{width} x {hidden}".format(**r["key"])),
    Column("activation", lambda r: r["key"]["activation"]),
    Column("tokens", lambda r: str(r["key"]["tokens"])),
    Column("arguments, GB", gigabytes("dense", "argument_bytes")),
    *(Column(f"{v}, temporaries, GB", gigabytes(v, "temp_bytes")) for v in VARIANTS),
    *(Column(f"{v}, peak, GB", gigabytes(v, "peak_bytes")) for v in VARIANTS),
    Column("peak, sparse / MVUE against dense", ratios(VARIANTS)),
    Column("launches", counts(VARIANTS[1:], "kernels")),
    Column("HGMMA.SP", counts(VARIANTS[1:], "sparse_instructions")),
    Column("spilled bytes", counts(VARIANTS[1:], "spill_bytes")),
    Column("serialized", counts(VARIANTS[1:], "serialized_kernels")),
)


def _compile_all(key: Key, mesh: jax.sharding.Mesh) -> dict[str, aot.AotReport]:
    (block,) = (block for block in BLOCKS if block.name == key["name"])
    return {name: compile_block(block, name, mesh) for name in VARIANTS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the blocks that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if no kernel spills registers or is serialized.
    """
    return run_compilations(
        "nm_matmul_memory_h200",
        [{**block._asdict(), "tokens": TOKENS} for block in BLOCKS],
        _compile_all,
        COLUMNS,
        description=__doc__ or "",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
