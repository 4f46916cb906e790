"""How much memory does a train step need on an H200, with dense and with block-sparse attention?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.memory [--force]

Nothing runs: whole train steps, and one attention call with its gradients, are compiled for the
GPU, and XLA says what they allocate. A pattern is data, so the figures hold at every density.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Column, Results, make_table
from configs import gpt2_124m_spion, spion
from pallas_kernels import aot, block_sparse_attention
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.data import describe_data
from sparsejax.tools.plan import compile_programs

# What SAT reports as its best saving, doi:10.1109/ACCESS.2024.3425638; there for a phase alone.
TARGET_SAVING = 6.87
# Its overloads tell apart what a name in a variable cannot.
_ATTEND: Any = block_sparse_attention
IMPLEMENTATIONS = ("dense", "xla", "mosaic_sm90")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One model whose train step is compiled.

    Attributes:
      make_config: function returning a ConfigDict.
      num_layers: int or None, None as configured.
      batch_size: int, examples of one step without micro-batches.
      length: int, positions.
      remat: bool, whether activations are computed again in the backward pass.
    """

    name: str
    make_config: Callable[[], Any]
    num_layers: int | None = None
    batch_size: int
    length: int
    remat: bool = False

    def config(self, implementation: str) -> dict[str, Any]:
        """Return the settings of a run.

        Args:
          implementation: of sparse attention.

        Returns:
          nested dict.
        """
        config = self.make_config()
        config.num_micro_batches = 1
        config.model.dtype = "bfloat16"
        config.model.remat = self.remat
        config.model.attention_implementation = (
            None if implementation == "dense" else implementation
        )
        config.data.batch_size = self.batch_size
        config.data.sequence_length = self.length
        if self.num_layers is not None:
            config.model.num_layers = self.num_layers
        return config.to_dict()


# The two tasks of SAT with blocks of 64, at its layers and batch (seeds of its released code).
SAT = (
    Setting(
        name="SAT retrieval",
        make_config=functools.partial(spion.get_config, "retrieval"),
        batch_size=32,
        length=4096,
    ),
    Setting(
        name="SAT ListOps",
        make_config=functools.partial(spion.get_config, "listops"),
        num_layers=4,
        batch_size=128,
        length=2048,
    ),
)  # fmt: skip
GPT2 = tuple(
    Setting(
        name="GPT-2 124M", make_config=gpt2_124m_spion.get_config, batch_size=8192 // length,
        length=length, remat=True,
    )
    for length in (2048, 8192)
)  # fmt: skip


def compile_step(setting: Setting, implementation: str, mesh: jax.sharding.Mesh) -> aot.AotReport:
    """Compile the train step of the dense or the sparse phase.

    Args:
      implementation: "dense" for the dense phase, else that of the sparse one.
      mesh: from `aot.make_gpu_mesh`.
    """
    config = parse_config(setting.config(implementation))
    spec = describe_data(config.data)
    phases = make_recipe(config, make_transformer_config(config, **spec._asdict())).phases
    phase = phases[0 if implementation == "dense" else -1]
    return compile_programs(config, spec, phase, mesh=mesh, names=["train step"])["train step"]


def compile_attention(
    setting: Setting, implementation: str, mesh: jax.sharding.Mesh
) -> aot.AotReport:
    """Compile one layer's attention of the step, forward and backward.

    Args:
      implementation: "dense" without a mask, else that of sparse attention.
      mesh: from `aot.make_gpu_mesh`.
    """
    config = parse_config(setting.config(implementation))
    spec = describe_data(config.data)
    model = make_transformer_config(config, **spec._asdict())
    batch = setting.batch_size * model.num_towers
    heads = (batch, setting.length, model.num_heads, model.head_dim)
    x = jax.ShapeDtypeStruct(heads, jnp.bfloat16)
    num_blocks = setting.length // 64
    mask = jax.ShapeDtypeStruct((1, 1, num_blocks, num_blocks), jnp.bool_)
    attend: Any = functools.partial(
        _ATTEND, block_q=64, block_kv=64, causal=model.causal,
        implementation=implementation,
    )  # fmt: skip

    def forward_and_backward(q, k, v, d_out, mask):
        blocks = None if implementation == "dense" else mask
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, blocks), q, k, v)
        return out, vjp(d_out)

    return aot.compile_for(forward_and_backward, x, x, x, x, mask, mesh=mesh)


def _gigabytes(part, implementation):
    def cell(record):
        value = record["values"][part][implementation]
        return f"{value['peak_bytes'] / 1e9:.2f}"

    return cell


def attention_saving(record: Any) -> float:
    """Return how many times less memory attention needs in the kernel than dense.

    Operands, results and gradients count as well: they are there in either case.

    Args:
      record: of one setting.

    Returns:
      float, peak bytes dense / in the Hopper kernel.
    """
    attention = record["values"]["attention"]
    return attention["dense"]["peak_bytes"] / attention["mosaic_sm90"]["peak_bytes"]


COLUMNS = (
    Column("model", lambda r: r["key"]["name"]),
    Column("batch x length", lambda r: "{batch_size} x {length}".format(**r["key"])),
    *(
        Column(f"{part}, {name}, GB", _gigabytes(part, name))
        for part in ("attention", "step")
        for name in IMPLEMENTATIONS
    ),
    Column("attention, dense / kernel", lambda r: f"{attention_saving(r):.1f}x"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the settings that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if attention at SAT's settings saves at least what SAT reports.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--force", action="store_true", help="compile settings already recorded")
    force = parser.parse_args(arguments).force
    results = Results(RESULTS / "memory_h200.json")
    mesh = aot.make_gpu_mesh(aot.H200)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for setting in (*SAT, *GPT2):
        key = {name: getattr(setting, name) for name in ("name", "batch_size", "length")}
        if key in results and not force:
            continue
        values = {
            part: {
                name: {
                    "temp_bytes": (report := compiler(setting, name, mesh)).temp_bytes,
                    "peak_bytes": report.peak_bytes,
                }
                for name in IMPLEMENTATIONS
            }
            for part, compiler in (("attention", compile_attention), ("step", compile_step))
        }
        results.record(key, values, environment)
        print(f"memory {key}", flush=True)
    table = make_table(results.records, COLUMNS)
    (RESULTS / "memory_h200.md").write_text(table)
    print("\n" + table)
    savings = {
        record["key"]["name"]: attention_saving(record)
        for record in results.records
        if record["key"]["name"].startswith("SAT")
    }
    for name, saving in savings.items():
        met = "met" if saving >= TARGET_SAVING else "missed"
        print(f"{name}: attention {saving:.1f}x less than dense; goal {TARGET_SAVING}x {met}")
    return 0 if all(saving >= TARGET_SAVING for saving in savings.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
