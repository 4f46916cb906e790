"""What does choosing attention blocks cost beside the attention that it serves?

    python -m benchmarks.dynamic_cost [--headline] [--force] [--budget-seconds=N]

4,096 positions, 9 query and 3 key/value heads of 64, as SmolLM2-135M has them; a fifth of the
visible blocks. "choose" is `DynamicBlocks` with habits, "attend" the op with what it chose,
"dense" the op with all blocks; forward passes, in turns.

Legend: B batch, T position, N query heads, K key/value heads, H head dim.
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels import block_sparse_attention
from sparsejax.masks import DynamicBlocks
from sparsejax.masks.attention.dynamic import Budget
from sparsejax.masks.attention.habits import NUM_CLASSES, Habits

NAME, LENGTH, HEADS, KV_HEADS, WIDTH, DENSITY = "dynamic_cost", 4096, 9, 3, 64, 0.2
SETTINGS = ((64, 128), (32, 128), (32, 256), (64, 64), (32, 32), (64, 0), (32, 0))


def make_case(block_size: int, spacing: int) -> Case:
    """Make the calls of one size of blocks and one spacing of samples.

    Args:
      block_size: int, side of a block, positions.
      spacing: int, positions between sampled queries; 0 = none are sampled.
    """
    blocks = DynamicBlocks(
        density=DENSITY,
        block_size=block_size,
        num_blocks=LENGTH // block_size,
        causal=True,
        num_queries=1 if spacing else 0,
        query_spacing=spacing or None,
    )
    rng = np.random.default_rng(0)
    habits = Habits(rng.random((HEADS, NUM_CLASSES)), rng.random(HEADS), rng.random(HEADS))
    habits = Habits(*(jnp.asarray(x, jnp.float32) for x in habits))
    budget = Budget(jnp.asarray(blocks.count(LENGTH // block_size, HEADS)[0]), habits)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, LENGTH, heads, WIDTH)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    kept = jax.jit(blocks)(q, k, None, budget)

    def choose(q, k, v, kept, budget):
        return blocks(q, k, None, budget).astype(jnp.float32)

    def attend(q, k, v, kept, budget, **options):
        sides = {"block_q": block_size, "block_kv": block_size, "causal": True}
        return block_sparse_attention(q, k, v, kept, **sides, **options)

    def attend_everywhere(q, k, v, kept, budget, **options):
        return attend(q, k, v, jnp.ones_like(kept), budget, **options)

    return Case(
        functions={"choose": choose, "attend": attend, "dense": attend_everywhere},
        args=(q, k, v, kept, budget),
        reference=functools.partial(attend, implementation="dense"),
        references={
            "choose": lambda q, k, v, kept, budget: kept.astype(jnp.float32),
            "dense": functools.partial(attend_everywhere, implementation="dense"),
        },
        tolerance=1e-4,
    )


def _milliseconds(name: str) -> Column:
    return Column(f"{name}, ms", lambda r: f"{1e3 * r['values'][name]['median_seconds']:.1f}")


COLUMNS = (
    Column("blocks of", lambda r: str(r["key"]["block"])),
    Column("a sample every", lambda r: str(r["key"]["spacing"] or "none")),
    *map(_milliseconds, ("choose", "attend", "dense")),
    Column(
        "choose / attend",
        lambda r: "{:.1%}".format(
            r["values"]["choose"]["median_seconds"] / r["values"]["attend"]["median_seconds"]
        ),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the table.

    Args:
      arguments: of the command line.

    Returns:
      int, 0 if every function was right.
    """
    options = parse_arguments("What choosing attention blocks costs.", arguments)
    points = [
        Point({"block": block, "spacing": spacing}, functools.partial(make_case, block, spacing))
        for block, spacing in SETTINGS[: 2 if options.headline else None]
    ]
    return run_points(
        NAME, points, COLUMNS, force=options.force, budget_seconds=options.budget_seconds
    )


if __name__ == "__main__":
    sys.exit(main())
