"""How much memory does a training step of GPT-2 need on an H200, dense and with FST?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.fst_gpt2_memory [--force]

Nothing runs: the train steps of `configs/gpt2.py` and `configs/fst_gpt2.py`, batches of 512
sequences in 16 parts, search for masks, packing and MVUE included, are compiled for the GPU. XLA
says what they allocate, ptxas what the kernels spill.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.nm_matmul_memory import summarise
from benchmarks.records import Column, Results, make_table
from configs import fst_gpt2, gpt2
from pallas_kernels import aot
from sparsejax.training.config import make_recipe, make_transformer_config, parse_config
from sparsejax.training.data import Facts
from sparsejax.training.plan import compile_programs

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

    Returns:
      AotReport.
    """
    settings = (fst_gpt2 if sparse else gpt2).get_config(size).to_dict()
    settings["model"] |= model
    if sparse:
        settings["model"]["weight_implementation"] = "mosaic_sm90"
    config = parse_config(settings)
    facts = Facts("language_model", config.model.vocab_size, 0)
    phase = make_recipe(config, make_transformer_config(config, **facts._asdict())).phases[0]
    return compile_programs(config, facts, phase, mesh=mesh, names=[_TRAIN])[_TRAIN]


def _gigabytes(variant: str, name: str):
    return lambda record: f"{record['values'][variant][name] / 1e9:.2f}"


def _ratio(record: Any) -> str:
    values = record["values"]
    return f"{values['FST']['peak_bytes'] / values['dense']['peak_bytes']:.2f}x"


def _count(name: str):
    return lambda record: str(record["values"]["FST"][name])


VARIANTS = ("dense", "FST")
COLUMNS = (
    Column("GPT-2", lambda r: r["key"]["size"]),
    *(Column(f"{v}, state and batch, GB", _gigabytes(v, "argument_bytes")) for v in VARIANTS),
    *(Column(f"{v}, temporaries, GB", _gigabytes(v, "temp_bytes")) for v in VARIANTS),
    *(Column(f"{v}, peak, GB", _gigabytes(v, "peak_bytes")) for v in VARIANTS),
    Column("FST against dense", _ratio),
    Column("kernels", _count("kernels")),
    Column("HGMMA.SP", _count("sparse_instructions")),
    Column("spilled bytes", _count("spill_bytes")),
    Column("serialized", _count("serialized_kernels")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the steps that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if no kernel spills registers or is serialized.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--force", action="store_true", help="compile steps already recorded")
    force = parser.parse_args(arguments).force
    results = Results(RESULTS / "fst_gpt2_memory_h200.json")
    mesh = aot.make_gpu_mesh(aot.H200)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for size in gpt2.SIZES:
        key = {"size": size}
        if key in results and not force:
            continue
        values = {
            name: summarise(compile_step(size, mesh, sparse=name == "FST")) for name in VARIANTS
        }
        results.record(key, values, environment)
        print(f"memory {key}", flush=True)
    table = make_table(results.records, COLUMNS)
    (RESULTS / "fst_gpt2_memory_h200.md").write_text(table)
    print("\n" + table)
    sparse = [record["values"]["FST"] for record in results.records]
    return 1 if any(v["spill_bytes"] or v["serialized_kernels"] for v in sparse) else 0


if __name__ == "__main__":
    sys.exit(main())
