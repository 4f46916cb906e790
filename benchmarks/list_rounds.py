"""Does a program of the Hopper attention kernels that stays wait for others that have longer lists?

    JAX_PLATFORMS=cpu python -m benchmarks.list_rounds

A simulation: nothing runs. Lists are dealt to the processors of an H200 as the kernels deal them,
longest first and in rounds that go back and forth, and as the hardware would if each list were a
program of its own: to whoever is free. Both are compared with the work divided evenly. What a turn
takes, and the start of a program, is that of `benchmarks.cycle_model` for a head of 128 in blocks
of 128.
"""

import heapq
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.cycle_model import GLOBAL_LATENCY
from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.records import Column, Results, make_table
from pallas_kernels import aot
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import make_order

# Clocks: a turn of the tensor cores, three reads until the first tile is there, and a tile of
# results that is written to shared memory and read from there.
_TURN, _START, _BETWEEN = 2048, 3 * GLOBAL_LATENCY, 512
_NUM_BLOCKS, _NUM_HEADS = 32, 64
_HEAD = """**Simulated: nothing was run.** Time until the last of 132 processors is done, as a
multiple of the lists' tiles divided evenly: 64 heads, of all examples, of 32 blocks each. The first
column deals lists as the kernels do, the second as the hardware would if no program stayed.

"""


def list_patterns() -> Iterator[tuple[str, np.ndarray]]:
    """Yield names of patterns, and how many blocks each of 32 lists has."""
    rng = np.random.default_rng(0)
    blocks = np.arange(1, _NUM_BLOCKS + 1)
    yield "a quarter, evenly", np.full(_NUM_BLOCKS, 8)
    yield "a quarter at random", rng.binomial(_NUM_BLOCKS, 0.25, _NUM_BLOCKS)
    yield "a tenth at random", np.maximum(1, rng.binomial(_NUM_BLOCKS, 0.1, _NUM_BLOCKS))
    yield "causal", blocks
    yield "causal, a quarter at random", np.maximum(1, rng.binomial(blocks, 0.25))
    yield "a full row and five blocks in each other", np.array([32] + [5] * 31)
    yield "lengths 32 / n", np.maximum(1, 32 // blocks)


def deal(num_lists: int, processors: int) -> np.ndarray:
    """Deal lists to processors in rounds that go back and forth.

    Returns:
      int[num_lists], which processor takes each.
    """
    rounds, places = np.divmod(np.arange(num_lists), processors)
    return np.where(rounds % 2, processors - 1 - places, places)


def deal_rounds(clocks: Sequence[float], processors: int) -> float:
    """Return when the last processor is done, if each takes a list of every round.

    Args:
      clocks: float, of each list, in their order.
    """
    taken = np.asarray(clocks) + _BETWEEN
    return _START + float(np.bincount(deal(len(clocks), processors), weights=taken).max())


def deal_to_the_free(clocks: Sequence[float], processors: int) -> float:
    """Return when the last processor is done, if whoever is free starts the next list."""
    busy = [0.0] * processors
    for each in clocks:
        heapq.heappush(busy, heapq.heappop(busy) + each + _START + _BETWEEN)
    return max(busy)


def main() -> None:
    """Simulate all patterns, and write the table."""
    results = Results(RESULTS / "list_rounds.json")
    processors = aot.H200.cores
    environment = describe_environment() | {"device": f"simulated {aot.H200.name}"}
    for name, counts in list_patterns():
        order = np.asarray(make_order(jnp.asarray(counts, jnp.int32), _NUM_HEADS))
        clocks = [float(_TURN * counts[place % len(counts)]) for place in order]
        even = sum(clocks) / processors
        values = {
            "rounds": round(deal_rounds(clocks, processors) / even, 3),
            "to_the_free": round(deal_to_the_free(clocks, processors) / even, 3),
        }
        results.record({"pattern": name}, values, environment)
    columns = [
        Column("lists", lambda x: x["key"]["pattern"]),
        Column("in rounds, by programs that stay", lambda x: f"{x['values']['rounds']:.2f}"),
        Column("one program each", lambda x: f"{x['values']['to_the_free']:.2f}"),
    ]
    text = _HEAD + make_table(results.records, columns)
    (RESULTS / "list_rounds.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
