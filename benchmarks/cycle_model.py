"""How fast is a Hopper kernel, by what one turn of its main loop takes of each resource?

A model, not a measurement. For one turn of all computing warpgroups of a program it counts clocks

- of the tensor cores;
- of shared memory: operands of products, and tiles that copies write;
- of issue slots, and of the unit for exponentials;
- of the *path*: warps that issue in order, with the stalls and scoreboards of the machine code,
  that share units, wait for their products and for each other. What overlaps is followed, not
  assumed (`benchmarks.turn_timing`).

A turn takes the most of these, at a clock that power allows: energy is that of the tensor cores and
of instructions, power goes with the third power of the clock, since voltage goes with it. Tiles
that copies read from the second-level cache may take longer; the cache has a clock of its own.
Tiles are dealt to the processors in rounds. A program begins with reads of global memory that wait
for one another, and ends when its last tile is stored; one that stays does so once.

The rule is one for all kernels. It was chosen with the anchors of `benchmarks.cycle_cases` in view;
no constant was fitted to them. Constants are of an H100 SXM; an H200 has the same processors, clock
and power limit. Unless another source is named, they are measurements of
https://github.com/Johnsonms/NVIDIA-Hopper-Benchmark, reproduction/H100-dapperdingo.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.loop_turns import MainLoop, Turn
from benchmarks.turn_timing import SHARED_BYTES_PER_CLOCK, time_product, time_turn
from pallas_kernels.aot import GpuTarget

EXPONENTIAL_CLOCKS = 8
"""Of a warp instruction, on the unit of a quarter processor: 16 results a clock and processor."""

GLOBAL_LATENCY = 484
"""Clocks of a read that misses the second-level cache."""

L2_BYTES_PER_SECOND = 9.52e12
"""That all processors read from the second-level cache together: 4808 bytes a clock of 1.98 GHz."""

CLOCK_GHZ = 1.98
"""The highest clock, which a kernel has that is not limited by power."""

POWER_CLOCK_GHZ = 1.668
"""What is left of it if tensor cores never pause: 901.8 TFLOP/s with random operands."""

INSTRUCTION_ENERGY = 1.5
"""Energy of a warp instruction, in clocks of the tensor core of a quarter processor. Fetching and
decoding an instruction and reading its operands takes 30 pJ a thread (W. J. Dally, keynote at MICRO
52, 2019), 0.96 nJ a warp. A tensor core takes 0.62 nJ a clock: 528 share 550 W at 1.668 GHz, the
limit of 700 W without some 150 W for memory and leakage, which is an assumption."""


class Plan(NamedTuple):
    """What a kernel does besides its loop, from its tiles.

    Attributes:
      tiles: int, of the result: programs, or what programs that stay go through.
      flops: float, of the products of a tile.
      copied_bytes: float, that are streamed into shared memory for a tile.
      stored_bytes: float, of a tile that is stored through shared memory.
      memory_bytes: float, that the whole kernel must read from and write to device memory.
      start_reads: int, reads of global memory before the first product of a program, each waiting
        for the one before; the first streamed tile is the last of them.
      warpgroups: int, that compute.
      l2_bytes: float, that are read from the second-level cache for a tile; None if all that are
        copied are, and no other program of a cluster reads a part of them.
    """

    tiles: int
    flops: float
    copied_bytes: float
    stored_bytes: float
    memory_bytes: float
    start_reads: int = 1
    warpgroups: int = 2
    l2_bytes: float | None = None


class Kernel(NamedTuple):
    """A kernel of a case.

    Attributes:
      prefix: str, of its name in the program. Of several with one prefix, those come first that do
        less in a turn.
      loop: int, which of its loops that multiply, those with most products first.
    """

    label: str
    prefix: str
    plan: Plan
    loop: int = 0


class Case(NamedTuple):
    """A program to compile, and the kernels of it that are looked at.

    Attributes:
      structure: str, in a few words.
      function: of `args`.
      args: pytrees of `jax.ShapeDtypeStruct`.
      published_tflops: float, rate of all kernels together, if there is one.
      published_flops: float, operations that it is made of, if not those of the plans.
    """

    name: str
    structure: str
    function: Callable[..., Any]
    args: tuple
    kernels: Sequence[Kernel]
    published_tflops: float | None = None
    published_flops: float | None = None


class Counts(NamedTuple):
    """What one warp does in a turn, as the machine code has it.

    Attributes:
      tensor_clocks: float, of the products of its warpgroup.
      operand_bytes: int, that they read from shared memory.
      flops: int, of them.
      exponentials: int, instructions of the unit for special functions.
      in_flight: int, groups of products that a wait of its leaves in flight, at most.
      has_order: bool, the warpgroups tell each other when to go on.
    """

    instructions: int
    products: int
    tensor_clocks: float
    operand_bytes: int
    flops: int
    exponentials: int
    in_flight: int
    has_order: bool


class Prediction(NamedTuple):
    """What the model says of a kernel.

    Attributes:
      clocks: resource -> clocks of a turn; of the path the mean over lags between warpgroups.
      spread: least and most clocks of the path.
      clock_ghz: float, that power allows.
      bound: str, what a turn takes most of: a resource, "waits" where the path is clearly longer
        than any, "L2", or "memory" for the whole kernel.
      turns: float, of a program.
      l2_share: float, of the rate of the second-level cache, while turns go on.
      seconds: float, of the kernel.
      flops_per_second: float, of all operations that it executes.
      start_clocks: float, that reads of global memory take before the first product.
      between_clocks: float, from the last product of a tile to the first of the next.
    """

    clocks: Mapping[str, float]
    spread: tuple[float, float]
    clock_ghz: float
    bound: str
    turns: float
    l2_share: float
    seconds: float
    flops_per_second: float
    start_clocks: float
    between_clocks: float


def count(turn: Turn) -> Counts:
    """Count what a warp does in a turn."""
    products = [x.product for x in turn if x.product]
    return Counts(
        instructions=len(turn),
        products=len(products),
        tensor_clocks=sum(time_product(p) for p in products),
        operand_bytes=sum(p.shared_bytes for p in products),
        flops=sum(p.flops for p in products),
        exponentials=sum(x.unit == "mufu" for x in turn),
        in_flight=max((x.in_flight for x in turn if x.in_flight is not None), default=0),
        has_order=any(x.meets for x in turn),
    )


def predict(loop: MainLoop, plan: Plan, gpu: GpuTarget) -> Prediction:
    """Predict the rate of a kernel.

    Args:
      loop: from `read_main_loop`.
    """
    counts = count(loop.turn)
    turns = plan.flops / (plan.warpgroups * counts.flops)
    copied_bytes = plan.copied_bytes / turns
    paths = time_turn(loop.turn, plan.warpgroups)
    clocks = count_clocks(counts, copied_bytes, plan.warpgroups)
    clocks["path"] = sum(paths) / len(paths)
    longest, bound = max(clocks.values()), find_bound(clocks)
    clock_ghz = find_clock(longest, plan.warpgroups * _count_energy(counts))
    turn_seconds = longest / clock_ghz * 1e-9
    l2_bytes = copied_bytes if plan.l2_bytes is None else plan.l2_bytes / turns
    l2_seconds = l2_bytes * gpu.cores / L2_BYTES_PER_SECOND
    if l2_seconds > turn_seconds:
        turn_seconds, bound = l2_seconds, "L2"
    rounds = math.ceil(plan.tiles / gpu.cores)
    starts = 1 if loop.is_repeated else rounds
    seconds = rounds * (turns * turn_seconds + _count_clocks_between(plan) / clock_ghz * 1e-9)
    start_clocks = (plan.start_reads + 1) * GLOBAL_LATENCY
    stored_seconds = plan.stored_bytes * gpu.cores / L2_BYTES_PER_SECOND
    seconds += starts * (start_clocks / clock_ghz * 1e-9 + l2_seconds + stored_seconds)
    memory_seconds = plan.memory_bytes / gpu.memory_bytes_per_second
    if memory_seconds > seconds:
        seconds, bound = memory_seconds, "memory"
    return Prediction(
        clocks=clocks,
        spread=(min(paths), max(paths)),
        clock_ghz=clock_ghz,
        bound=bound,
        turns=turns,
        l2_share=l2_seconds / turn_seconds,
        seconds=seconds,
        flops_per_second=plan.tiles * plan.flops / seconds,
        start_clocks=start_clocks,
        between_clocks=_count_clocks_between(plan),
    )


def count_clocks(counts: Counts, copied_bytes: float, warpgroups: int) -> dict[str, float]:
    """Count the clocks of a turn that each resource of a processor is busy.

    Args:
      copied_bytes: float, that copies write to shared memory in a turn.
      warpgroups: int, of each of which a quarter processor has one warp.

    Returns:
      dict from the resource to clocks.
    """
    shared_bytes = warpgroups * counts.operand_bytes + copied_bytes
    return {
        "tensor cores": warpgroups * counts.tensor_clocks,
        "shared memory": shared_bytes / SHARED_BYTES_PER_CLOCK,
        "issue": float(warpgroups * counts.instructions),
        "exponentials": float(warpgroups * counts.exponentials * EXPONENTIAL_CLOCKS),
    }


def find_bound(clocks: Mapping[str, float]) -> str:
    """Find what a turn takes most of.

    Args:
      clocks: resource -> clocks, "path" among them.

    Returns:
      str, a resource, or "waits" if the path is longer than the busiest by more than a tenth.
    """
    busiest = max((name for name in clocks if name != "path"), key=lambda name: clocks[name])
    return "waits" if clocks["path"] > 1.1 * clocks[busiest] else busiest


def find_clock(clocks: float, energy: float) -> float:
    """Find the clock that power allows.

    Power is energy over time, energy goes with the square of voltage and so of the clock. Tensor
    cores alone, without a pause, run at `POWER_CLOCK_GHZ`.

    Args:
      clocks: float, of a turn.
      energy: float, of a turn, in clocks of the tensor cores.

    Returns:
      float, in GHz.
    """
    return min(CLOCK_GHZ, POWER_CLOCK_GHZ * (clocks / energy) ** (1 / 3))


def _count_energy(counts: Counts) -> float:
    return counts.tensor_clocks + INSTRUCTION_ENERGY * counts.instructions


def _count_clocks_between(plan: Plan) -> float:
    """Return clocks from the last product of a tile to the first of the next, if programs stay.

    A tile is written to shared memory and read from there; its copy to global memory goes on.
    """
    return plan.stored_bytes * 2 / SHARED_BYTES_PER_CLOCK
