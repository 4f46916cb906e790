"""How much faster is a sparse step than a dense one at SAT's retrieval setting?

    python -m benchmarks.sat_retrieval [--headline] [--force] [--budget-seconds=N]

Timed are whole training steps of the two-tower model of `configs/sat.py:retrieval`: two documents
of 4096 positions, 86 of 64 x 64 blocks kept (density 0.021), the pattern as SAT makes it of random
parameters. Dense are JAX's own attention (cuDNN's where that runs) and our loop with every block
kept, of which the faster counts.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.harness import Case, Point, parse_arguments
from benchmarks.records import Column
from benchmarks.steps import (
    make_classification_batch,
    make_step_call,
    make_steps_case,
    run_and_evaluate,
)
from benchmarks.targets import Target, seconds_of
from configs import sat
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.optimizer import make_optimizer

DENSE, LOOP, SPARSE = "dense", "own loop, every block", "SAT"
_VOCAB_SIZE = 257


def make_case(batch_size: int, dtype: str) -> Case:
    """Make the three steps.

    Args:
      batch_size: int, pairs of documents.
      dtype: str, of activations.
    """
    settings = sat.get_config("retrieval").to_dict()
    settings["data"]["batch_size"], settings["num_micro_batches"] = batch_size, 1
    settings["model"]["dtype"] = dtype
    config = parse_config(settings)
    model = make_transformer_config(config, task="matching", vocab_size=_VOCAB_SIZE, num_classes=2)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
    recipe = make_recipe(config, model)
    dense, sparse = recipe.phases
    # Without probes, which SAT's dense phase pays for as well: the harder rival.
    all_blocks = dense._replace(sparse_attention=True)
    loop_recipe = recipe._replace(phases=(all_blocks,))
    batch = make_classification_batch(
        batch_size=batch_size,
        shape=(2, model.max_length),
        vocab_size=_VOCAB_SIZE,
        num_classes=2,
    )
    make = functools.partial(make_step_call, model, optimizer=optimizer, batch=batch)
    return make_steps_case(
        {
            SPARSE: make(recipe, sparse),
            DENSE: make(recipe, dense),
            LOOP: make(loop_recipe, all_blocks),
        }
    )


def _speedup(record: Any) -> float:
    return min(seconds_of(record, DENSE), seconds_of(record, LOOP)) / seconds_of(record, SPARSE)


COLUMNS = (
    Column("pairs", lambda r: str(r["key"]["batch"])),
    Column("type", lambda r: r["key"]["dtype"]),
    *(
        Column(f"{name}, ms", lambda r, name=name: f"{1e3 * seconds_of(r, name):.0f}")
        for name in (DENSE, LOOP, SPARSE)
    ),
    Column("SAT against the faster", lambda r: f"{_speedup(r):.2f}x"),
)
TARGETS = (Target("a sparse step is 2.84x faster", _speedup, lambda x: x >= 2.84),)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the point if it is missing; write and print table and target.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every step trained. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    parsed.pop("headline")
    on_cpu = jax.devices()[0].platform == "cpu"
    batch_size, dtype = (1, "float32") if on_cpu else (8, "bfloat16")
    key = {"batch": batch_size, "dtype": dtype}
    point = Point(key, functools.partial(make_case, batch_size, dtype))
    return run_and_evaluate("sat_retrieval", [point], COLUMNS, TARGETS, **parsed)


if __name__ == "__main__":
    sys.exit(main())
