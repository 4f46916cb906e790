"""How fast should the Hopper kernels be, by their machine code, and what limits them?

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.hopper_cycles

Predictions: nothing runs. Kernels are compiled for a GPU that need not be there, their main loops
read, and `benchmarks.cycle_model` says what a turn takes of each resource and what rate follows.
First come kernels of JAX whose rates are published (`benchmarks.cycle_cases`), with the error of
the model, then ours. Rates are of all operations that a kernel executes in kept blocks; of a 2:4
product zeros count, as usual.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.cycle_cases import list_anchors, list_cases, read_loops
from benchmarks.cycle_model import Case, Prediction, count, predict
from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.loop_turns import MainLoop
from benchmarks.records import Column, Results, make_table
from pallas_kernels import aot

PATH = RESULTS / "hopper_cycles.json"
PEAK_TFLOPS = 989.4
"""Dense products of 16 bits, of the data sheet."""

_HEAD = """**Predictions: nothing was run.** By a model of one turn of each kernel's main loop
([docs](../../docs/proofs.md#predicted-rates-the-cycle-model)), tried on JAX's kernels first.
Clocks are of a turn of all computing warpgroups of a program. The path is what a turn takes if
tiles are always there in time; two numbers are the least and the most, by how warpgroups that
nothing orders happen to begin. Where the path is longer than the busiest resource by more than a
tenth, waits are the bound. A tile takes so many turns. What it takes to start is paid for every
tile, or once by programs that stay; what is between tiles, for every tile.

"""


def describe_counts(loop: MainLoop) -> dict[str, Any]:
    """Return what a record keeps of a kernel's main loop: `Counts`, and whether it is repeated."""
    return {**count(loop.turn)._asdict(), "is_repeated": loop.is_repeated}


def _describe(prediction: Prediction) -> dict[str, Any]:
    clocks = {name: round(value, 1) for name, value in prediction.clocks.items()}
    return {
        "clocks": clocks,
        "least_path": round(prediction.spread[0], 1),
        "most_path": round(prediction.spread[1], 1),
        "clock_ghz": round(prediction.clock_ghz, 3),
        "bound": prediction.bound,
        "l2_share": round(prediction.l2_share, 3),
        "turns": round(prediction.turns, 2),
        "start_clocks": round(prediction.start_clocks),
        "between_clocks": round(prediction.between_clocks),
    }


def record_case(results: Results, case: Case, target: aot.GpuTarget) -> None:
    """Predict the kernels of a case, and all together if their rate is published.

    Args:
      target: the GPU.
    """
    environment = describe_environment() | {"device": f"compiled for {target.name}"}
    predictions = {}
    for kernel, loop in zip(case.kernels, read_loops(case, target), strict=True):
        prediction = predict(loop, kernel.plan, target)
        predictions[kernel.label] = {
            "structure": case.structure,
            "counts": describe_counts(loop),
            "prediction": _describe(prediction),
            "tflops_per_second": prediction.flops_per_second / 1e12,
            "seconds": prediction.seconds,
        }
    if case.published_tflops:
        done = case.published_flops or sum(k.plan.tiles * k.plan.flops for k in case.kernels)
        predicted = done / sum(values["seconds"] for values in predictions.values()) / 1e12
        # The rate of several kernels stands in a record of its own.
        label = case.kernels[0].label if len(case.kernels) == 1 else "together"
        predictions.setdefault(label, {"tflops_per_second": predicted}).update(
            published_tflops_per_second=case.published_tflops,
            error=predicted / case.published_tflops - 1,
        )
    for label, values in predictions.items():
        results.record({"program": case.name, "kernel": label}, values, environment)


def _clocks(name: str) -> Callable[[Any], str]:
    return lambda record: f"{record['values']['prediction']['clocks'][name]:.0f}"


def _path(record: Mapping[str, Any]) -> str:
    prediction = record["values"]["prediction"]
    ends = (f"{prediction[name]:.0f}" for name in ("least_path", "most_path"))
    return " to ".join(dict.fromkeys(ends))


def _structure(record: Mapping[str, Any]) -> str:
    counts = record["values"]["counts"]
    facts = [record["values"]["structure"]]
    facts += ["stays"] * counts["is_repeated"] + ["warpgroups in turns"] * counts["has_order"]
    facts += [f"{counts['in_flight']} in flight" if counts["in_flight"] else "awaits all products"]
    return ", ".join(facts)


TABLE = (
    Column("program", lambda r: r["key"]["program"]),
    Column("kernel", lambda r: r["key"]["kernel"]),
    Column("structure", _structure),
    Column("tensor cores", _clocks("tensor cores")),
    Column("shared memory", _clocks("shared memory")),
    Column("exponentials", _clocks("exponentials")),
    Column("issue", _clocks("issue")),
    Column("path", _path),
    Column("turns", lambda r: f"{r['values']['prediction']['turns']:.3g}"),
    Column("to start", lambda r: f"{r['values']['prediction']['start_clocks']}"),
    Column("between tiles", lambda r: f"{r['values']['prediction']['between_clocks']}"),
    Column("of the L2 rate", lambda r: f"{r['values']['prediction']['l2_share']:.0%}"),
    Column("GHz", lambda r: f"{r['values']['prediction']['clock_ghz']:.2f}"),
    Column("bound", lambda r: r["values"]["prediction"]["bound"]),
    Column("predicted TFLOP/s", lambda r: f"{r['values']['tflops_per_second']:.0f}"),
    Column("of dense peak", lambda r: f"{r['values']['tflops_per_second'] / PEAK_TFLOPS:.0%}"),
    Column(
        "published TFLOP/s",
        lambda r: f"{r['values']['published_tflops_per_second']:.0f}",
        optional=True,
    ),
    Column("error", lambda r: f"{r['values']['error']:+.0%}", optional=True),
)


def main() -> int:
    """Compile all cases, write and print the table.

    Returns:
      int, exit code 0.
    """
    PATH.unlink(missing_ok=True)
    results = Results(PATH)
    for cases, target in ((list_anchors(), aot.H100), (list_cases(), aot.H200)):
        for case in cases:
            record_case(results, case, target)
    table = _HEAD + make_table(results.records, TABLE)
    PATH.with_suffix(".md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
