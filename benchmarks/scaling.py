"""How does GPT-2 with FST scale over H200s? A prediction, and what compiled programs say of it.

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.scaling [--force]

Nothing is timed. Bytes that a device sends in a step of 512 sequences follow from formulas, here
and in `docs/scaling.md`. They are compared with the collectives of train steps that are compiled
for 8 and 16 GPUs, and set against the time of the products, at rates that are assumed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.compiled import summarise
from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Key, Results
from benchmarks.scaling_law import (
    AXES,
    GRADIENTS,
    HEADS,
    PRODUCTS,
    SUMS,
    WEIGHTS,
    Mesh,
    Sent,
    choose_mesh,
    find_balance,
    predict,
    predict_seconds,
)
from configs import fst_gpt2
from pallas_kernels import aot
from sparsejax.accounting.collectives import Collective, find_collectives, sum_traffic
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import DataSpec
from sparsejax.models import TransformerConfig, assume_proven
from sparsejax.tools.plan import compile_programs
from sparsejax.tools.programs import TRAIN

SIZES = ("124m", "1558m")
RECORDS = RESULTS / "scaling.json"
REST = "rest"
"""Of what is sent, what is not predicted."""

COMPILED = {
    "124m": (
        Mesh(),
        Mesh(fsdp=8),
        Mesh(data=8),
        Mesh(fsdp=2, context=2, tensor=2),
        Mesh(fsdp=16),
    ),
    "1558m": (
        Mesh(),
        Mesh(fsdp=8),
        Mesh(fsdp=8, micro_batches=4),
        Mesh(data=2, fsdp=4),
        Mesh(fsdp=16),
        Mesh(data=2, fsdp=8),
    ),
}
"""What is compiled of each size."""


def make_model(size: str) -> TransformerConfig:
    """Return the model of a size.

    Args:
      size: one of `SIZES`, such as "124m".
    """
    config = _read_config(size, Mesh())
    return make_transformer_config(config, **_describe_data(config)._asdict())


def _read_config(size: str, mesh: Mesh) -> TrainConfig:
    settings = fst_gpt2.get_config(size).to_dict()
    settings["mesh"] |= mesh.sizes
    settings["num_micro_batches"] = mesh.micro_batches
    return parse_config(settings)


def _describe_data(config: TrainConfig) -> DataSpec:
    return DataSpec("language_model", config.model.vocab_size, 0)


def sort_collectives(collectives: Sequence[Collective]) -> Sent:
    """Sort what a compiled step sends into the parts that are predicted, and the rest.

    Args:
      collectives: of one step.
    """
    groups: dict[str, list[Collective]] = {name: [] for name in (*AXES, REST)}
    kinds = {
        WEIGHTS: ("all-gather", "reduce-scatter"),
        GRADIENTS: ("all-reduce",),
        HEADS: ("all-to-all",),
        SUMS: ("all-reduce",),
    }
    for each in collectives:
        fits = [
            part
            for part, axes in AXES.items()
            if each.kind in kinds[part] and each.axes and axes.issuperset(each.axes)
        ]
        groups[fits[0] if fits else REST].append(each)
    return {name: sum_traffic(group).sent_bytes for name, group in groups.items()}


def compile_step(size: str, mesh: Mesh) -> dict[str, Any]:
    """Compile the first phase's train step.

    Args:
      size: one of `SIZES`, such as "124m".
      mesh: where it runs.

    Returns:
      dict: "memory" of one device, as `summarise` has it; "sent", as `sort_collectives` has it.
    """
    config = _read_config(size, mesh)
    spec = _describe_data(config)
    phase = make_recipe(config, make_model(size)).phases[0]
    gpus = aot.make_gpu_mesh(aot.H200, axes=mesh.sizes, hosts=mesh.hosts)
    with assume_proven():
        report = compile_programs(config, spec, phase, mesh=gpus, names=[TRAIN])[TRAIN]
    collectives = find_collectives(report.hlo, mesh.sizes, hosts=mesh.hosts)
    return {"memory": summarise(report), "sent": sort_collectives(collectives)}


def make_memory_table(results: Results) -> str:
    """Make the table of memory.

    Args:
      results: what was compiled.

    Returns:
      str in Markdown.
    """
    rows = []
    for size, mesh in _list_points():
        memory = results[make_key(size, mesh)]["values"]["memory"]
        amounts = [memory[name] for name in ("argument_bytes", "temp_bytes", "peak_bytes")]
        rows.append((size, *_name(mesh), *map(_gigabytes, amounts)))
    return _make_table(
        ("GPT-2", *_HEAD, "state and batch, GB", "temporaries, GB", "peak, GB"), rows
    )


def make_check_table(results: Results) -> str:
    """Make the table that sets predictions against compiled programs.

    Args:
      results: what was compiled.

    Returns:
      str in Markdown.
    """
    rows = []
    for size, mesh in _list_points():
        if mesh.devices == 1:
            continue
        sent = results[make_key(size, mesh)]["values"]["sent"]
        for part, predicted in predict(make_model(size), mesh).items():
            if predicted:
                found = sent[part]
                ratio = f"{found / predicted:.3f}"
                rows.append(
                    (size, *_name(mesh), part, _gigabytes(predicted), _gigabytes(found), ratio)
                )
        rows.append((size, *_name(mesh), "the rest", "–", _gigabytes(sent[REST]), "–"))
    return _make_table(("GPT-2", *_HEAD, "part", "predicted, GB", "compiled, GB", "ratio"), rows)


def make_law_table() -> str:
    """Make the table of the scaling law.

    Returns:
      str in Markdown.
    """
    rows = []
    for size in SIZES:
        model = make_model(size)
        for devices in (8, 16, 32, 64, 128, 256, 512, 1024):
            mesh = choose_mesh(devices)
            sent, seconds = predict(model, mesh), predict_seconds(model, mesh)
            products, weights, gradients = (
                seconds[name] for name in (PRODUCTS, WEIGHTS, GRADIENTS)
            )
            rows.append(
                (
                    size,
                    f"{devices}",
                    f"{mesh}",
                    f"{mesh.batch}",
                    f"{mesh.micro_batches}",
                    f"{mesh.sequences:g}",
                    _gigabytes(sent[WEIGHTS]),
                    _gigabytes(sent[GRADIENTS]),
                    *(f"{1e3 * each:.1f}" for each in (products, weights, gradients)),
                    f"{products / (products + weights + gradients):.0%}",
                    f"{products / max(products, weights, gradients):.0%}",
                )
            )
    return _make_table(
        (
            "GPT-2", "GPUs", "mesh", "batch", "micro-batches", "sequences per device", "fsdp, GB",
            "data, GB", "products, ms", "fsdp, ms", "data, ms", "share of products, no overlap",
            "share of products, full overlap",
        ),
        rows,
    )  # fmt: skip


def make_balance_table() -> str:
    """Make the table of the tokens at which products take as long as weights and gradients.

    Returns:
      str in Markdown.
    """
    meshes = (
        (Mesh(fsdp=8), WEIGHTS),
        (Mesh(fsdp=16), WEIGHTS),
        (Mesh(data=8), GRADIENTS),
        (Mesh(data=64), GRADIENTS),
        (Mesh(data=2, fsdp=8), GRADIENTS),
        (Mesh(data=64, fsdp=8), GRADIENTS),
    )
    rows = []
    for mesh, part in meshes:
        tokens = (find_balance(make_model(size), mesh, part) for size in SIZES)
        rows.append((f"{mesh}", part, *(f"{count:,.0f}" for count in tokens)))
    return _make_table(("mesh", "traffic", *(f"{size}, tokens" for size in SIZES)), rows)


def make_ratio_table() -> str:
    """Make the table of the time of heads and activations, divided by that of the products.

    Returns:
      str in Markdown.
    """
    rows = []
    for axis, part in (("context", HEADS), ("tensor", SUMS)):
        for parts in (2, 4, 8, 16):
            mesh = Mesh()._replace(**{axis: parts})
            ratios = []
            for size in SIZES:
                seconds = predict_seconds(make_model(size), mesh)
                ratios.append(f"{seconds[part] / seconds[PRODUCTS]:.2f}")
            rows.append((f"{mesh}", part, *ratios))
    return _make_table(("mesh", "traffic", *(f"{size}, time / products" for size in SIZES)), rows)


_HEAD = ("GPUs", "mesh", "micro-batches")


def _name(mesh: Mesh) -> tuple[str, str, str]:
    return f"{mesh.devices}", f"{mesh}", f"{mesh.micro_batches}"


def _list_points() -> Iterator[tuple[str, Mesh]]:
    return ((size, mesh) for size, meshes in COMPILED.items() for mesh in meshes)


def make_key(size: str, mesh: Mesh) -> Key:
    """Return the key of a compiled step in the records.

    Args:
      size: one of `SIZES`, such as "124m".
      mesh: where it runs.
    """
    return {"size": size, "mesh": str(mesh), "micro_batches": mesh.micro_batches}


def _make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def make_tables(results: Results) -> tuple[str, ...]:
    """Make the tables, in the order of `docs/scaling.md`.

    Args:
      results: what was compiled.

    Returns:
      tuple of str in Markdown.
    """
    return (
        make_memory_table(results),
        make_law_table(),
        make_balance_table(),
        make_ratio_table(),
        make_check_table(results),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the steps that are missing and print the tables.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--force", action="store_true", help="compile points already recorded")
    force = parser.parse_args(arguments).force
    results = Results(RECORDS)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for size, mesh in _list_points():
        key = make_key(size, mesh)
        if force or key not in results:
            results.record(key, compile_step(size, mesh), environment)
            print(f"compiled {key}", flush=True)
    print("\n".join(make_tables(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
