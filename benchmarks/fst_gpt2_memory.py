"""How much memory does a training step of GPT-2 need on an H200, dense and with FST?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.fst_gpt2_memory [--force]

Nothing runs: the train steps of `configs/gpt2.py` and `configs/fst_gpt2.py`, batches of 512
sequences in 16 parts, search for masks, packing and MVUE included, are compiled for the GPU. XLA
says what they allocate, ptxas what the kernels spill.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.compiled import counts, gigabytes, ratios, run_compilations
from benchmarks.records import Column, Key
from configs import fst_gpt2, gpt2
from pallas_kernels import aot
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.data import DataSpec
from sparsejax.tools.plan import compile_programs

_TRAIN = "train step"


def compile_step(
    size: str, mesh: jax.sharding.Mesh, *, sparse: bool, **model: Any
) -> aot.AotReport:
    """Compile the first phase's train step.

    Args:
      size: str, one of `gpt2.SIZES`.
      mesh: from `aot.make_gpu_mesh`.
      sparse: bool, FST on the Hopper kernel; otherwise dense training.
      **model: settings of the model to change.
    """
    settings = (fst_gpt2 if sparse else gpt2).get_config(size).to_dict()
    settings["model"] |= model
    if sparse:
        settings["model"]["weight_implementation"] = "mosaic_sm90"
    config = parse_config(settings)
    spec = DataSpec("language_model", config.model.vocab_size, 0)
    phase = make_recipe(config, make_transformer_config(config, **spec._asdict())).phases[0]
    return compile_programs(config, spec, phase, mesh=mesh, names=[_TRAIN])[_TRAIN]


VARIANTS = ("dense", "FST")
COLUMNS = (
    Column("GPT-2", lambda r: r["key"]["size"]),
    *(Column(f"{v}, state and batch, GB", gigabytes(v, "argument_bytes")) for v in VARIANTS),
    *(Column(f"{v}, temporaries, GB", gigabytes(v, "temp_bytes")) for v in VARIANTS),
    *(Column(f"{v}, peak, GB", gigabytes(v, "peak_bytes")) for v in VARIANTS),
    Column("FST against dense", ratios(VARIANTS)),
    Column("kernels", counts(VARIANTS[1:], "kernels")),
    Column("HGMMA.SP", counts(VARIANTS[1:], "sparse_instructions")),
    Column("spilled bytes", counts(VARIANTS[1:], "spill_bytes")),
    Column("serialized", counts(VARIANTS[1:], "serialized_kernels")),
)


def _compile_both(key: Key, mesh: jax.sharding.Mesh) -> dict[str, aot.AotReport]:
    size = str(key["size"])
    return {name: compile_step(size, mesh, sparse=name == "FST") for name in VARIANTS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the steps that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if no kernel spills registers or is serialized.
    """
    return run_compilations(
        "fst_gpt2_memory_h200",
        [{"size": size} for size in gpt2.SIZES],
        _compile_both,
        COLUMNS,
        description=__doc__ or "",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
