"""Tables of programs that are compiled for a GPU and never run."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Column, Key, Results, make_table
from pallas_kernels import aot


def summarise(report: aot.AotReport) -> dict[str, int]:
    """Return what a record keeps of a compiled program.

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


def gigabytes(variant: str, name: str) -> Callable[[Any], str]:
    """Return the cell of a column of bytes.

    Args:
      variant: str, of the programs of a point.
      name: str, a key of `summarise`.

    Returns:
      Function of a record.
    """
    return lambda record: f"{record['values'][variant][name] / 1e9:.2f}"


def counts(variants: Sequence[str], name: str) -> Callable[[Any], str]:
    """Return the cell of a column of counts.

    Args:
      variants: of the programs of a point.
      name: str, a key of `summarise`.

    Returns:
      Function of a record.
    """
    return lambda record: " / ".join(str(record["values"][v][name]) for v in variants)


def ratios(variants: Sequence[str]) -> Callable[[Any], str]:
    """Return the cell of a column of peaks against that of the first program.

    Args:
      variants: of the programs of a point.

    Returns:
      Function of a record.
    """

    def cell(record: Any) -> str:
        first, *others = (record["values"][variant]["peak_bytes"] for variant in variants)
        return " / ".join(f"{peak / first:.2f}x" for peak in others)

    return cell


def run_compilations(
    name: str,
    keys: Iterable[Key],
    compile_point: Callable[[Key, jax.sharding.Mesh], Mapping[str, aot.AotReport]],
    columns: Sequence[Column],
    *,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Compile for an H200 what is missing, then write and print the table.

    Args:
      name: str, of the results' files.
      keys: of the points.
      compile_point: (key, mesh) -> variant -> AotReport.
      columns: of the table.
      description: str, whose first line the command line's help shows.
      arguments: list of str, `sys.argv[1:]` if None; `--force` compiles everything anew.

    Returns:
      int, exit code: 0 if no kernel spills registers or is serialized.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="compile points already recorded")
    force = parser.parse_args(arguments).force
    results = Results(RESULTS / f"{name}.json")
    mesh = aot.make_gpu_mesh(aot.H200)
    environment = describe_environment() | {"device": f"compiled for {aot.H200.name}"}
    for key in keys:
        if key in results and not force:
            continue
        reports = compile_point(key, mesh)
        values = {variant: summarise(report) for variant, report in reports.items()}
        results.record(key, values, environment)
        print(f"compiled {key}", flush=True)
    table = make_table(results.records, columns)
    (RESULTS / f"{name}.md").write_text(table)
    print("\n" + table)
    faults = [
        value[fault]
        for record in results.records
        for value in record["values"].values()
        for fault in ("spill_bytes", "serialized_kernels")
    ]
    return 1 if any(faults) else 0
