"""How long is a turn of a loop for warps that share a quarter of a processor?

The four quarters of a processor run in step, each with one warp of every computing warpgroup. Warps
issue in order. An instruction goes when the stall of the one before is over, its scoreboards are
clear, its unit is free and, if it waits for products or for the other warpgroup, these are done. A
quarter issues one instruction a clock, for the warp that can go first, on a tie for the one that
has waited longest. Products run one after the other, in the order in which they are issued. Tiles
are always there in time: what copies take is for others to count.
"""

import collections
import math

from benchmarks.loop_turns import Issue, Product, Turn

FLOPS_PER_CLOCK = 4096
"""Of the tensor cores of a processor, dense and 16 bits: 989.4 TFLOP/s at 1.83 GHz (data sheet). A
sparse product takes half the time per operation, zeros counted."""

SHARED_BYTES_PER_CLOCK = 128
"""Read from or written to the shared memory of a processor (127.5 measured, see `cycle_model`)."""

LATENCY = 29
"""Clocks until a result that a scoreboard guards is there: a read of shared memory, as measured.
Exponentials and shuffles are close. Also what passes until a warp sees that its products are done,
or that the other warpgroup has arrived."""

L2_LATENCY = 272
"""Clocks of a read of global memory in a loop, as measured."""

# Turns until the warps have found their rhythm, and turns that are averaged.
_WARM_UP, _TIMED = 12, 24
_LAGS = 8


def time_product(product: Product) -> float:
    """Return the clocks that tensor cores take for a product."""
    return product.flops / (FLOPS_PER_CLOCK * (2 if product.is_sparse else 1))


class _Warp:
    """Where a warp is, and what it waits for; times in clocks."""

    def __init__(self) -> None:
        self.position = 0
        self.issued_at = -1.0
        self.ready = 0.0
        self.scoreboards: dict[int, float] = collections.defaultdict(float)
        self.groups: list[float] = []
        self.arrivals: list[float] = []
        self.meetings = 0
        self.ends: list[float] = []


class _Quarter:
    """A quarter of a processor: its units, and the warps on it."""

    def __init__(self, turn: Turn, warpgroups: int, lag: float) -> None:
        self.turn = turn
        self.warps = [_Warp() for _ in range(warpgroups)]
        self.units: dict[str, float] = collections.defaultdict(float)
        self.products_end = 0.0
        self.now = 0.0
        meetings = [x for x in turn if x.meets]
        self.warps[-1].ready = lag
        self.has_order = warpgroups == 2 and bool(meetings)
        if self.has_order:
            # The second lets the first go on, and begins when the first lets it.
            self.warps[1].arrivals.append(0.0)
            self.warps[1].meetings = int(meetings[0].is_mutual)

    def step(self) -> None:
        """Issue the next instruction.

        Raises:
          ValueError: if no warp can go on.
        """
        times = {warp: max(self._find_time(warp), self.now) for warp in self.warps}
        warp = min(times, key=lambda warp: (times[warp], warp.issued_at))
        if times[warp] == math.inf:
            raise ValueError("the warpgroups wait for each other")
        self._issue(warp, times[warp])
        self.now = times[warp] + 1

    def _find_time(self, warp: _Warp) -> float:
        x = self.turn[warp.position]
        times = [warp.ready, self.units[x.unit] if x.unit else 0.0]
        times += [warp.scoreboards[number] for number in x.control.waits]
        if x.in_flight is not None and len(warp.groups) > x.in_flight:
            times.append(warp.groups[-1 - x.in_flight] + LATENCY)
        if self.has_order:
            times.append(self._find_meeting(warp, x))
        return max(times)

    def _find_meeting(self, warp: _Warp, x: Issue) -> float:
        """Return when the other warpgroup has arrived as often as this instruction needs."""
        (other,) = (other for other in self.warps if other is not warp)
        begins = warp is self.warps[1] and not warp.ends and warp.position == 0
        needed = 1 if begins else warp.meetings + 1 if x.meets else 0
        if not needed:
            return 0.0
        if x.arrives and not begins and len(warp.arrivals) == warp.meetings:
            warp.arrivals.append(warp.ready)
        return other.arrivals[needed - 1] + LATENCY if needed <= len(other.arrivals) else math.inf

    def _issue(self, warp: _Warp, at: float) -> None:
        x = self.turn[warp.position]
        warp.issued_at = at
        warp.ready = at + max(1, x.control.stall)
        if x.unit:
            self.units[x.unit] = at + x.unit_clocks
        latency = L2_LATENCY if x.is_global_read else LATENCY
        for scoreboard, clocks in (
            (x.control.until_read, max(1, x.unit_clocks)),
            (x.control.until_done, latency),
        ):
            if scoreboard is not None:
                warp.scoreboards[scoreboard] = max(warp.scoreboards[scoreboard], at + clocks)
        if x.product:
            clocks = max(time_product(x.product), x.product.shared_bytes / SHARED_BYTES_PER_CLOCK)
            self.products_end = max(self.products_end, at) + clocks
        if x.commits:
            warp.groups.append(self.products_end)
        if x.arrives and not x.meets:
            warp.arrivals.append(at)
        warp.meetings += x.meets
        warp.position += 1
        if warp.position == len(self.turn):
            warp.position = 0
            warp.ends.append(at)


def simulate(turn: Turn, warpgroups: int = 2, *, lag: float = 0.0) -> float:
    """Follow warps through turns until they have found their rhythm.

    Args:
      turn: what each warp issues in a turn.
      warpgroups: int, 1 or 2, one warp of each. Where they have an order, the second begins when
        the first lets it.
      lag: float, clocks after which the second begins at the earliest.

    Returns:
      float, clocks from one turn to the next, every warp taking one.

    Raises:
      ValueError: if the warpgroups wait for each other.
    """
    quarter, turns = _Quarter(turn, warpgroups, lag), _WARM_UP + _TIMED
    while any(len(warp.ends) < turns for warp in quarter.warps):
        quarter.step()
    return max((w.ends[turns - 1] - w.ends[_WARM_UP - 1]) / _TIMED for w in quarter.warps)


def time_turn(turn: Turn, warpgroups: int = 2) -> list[float]:
    """Return the clocks of a turn, for several lags between warpgroups if nothing orders them.

    Where nothing does, warpgroups may compute exponentials at the same time or in turns, as they
    happen to begin: both can go on for ever.

    Args:
      turn: what each warp issues in a turn.
      warpgroups: int, 1 or 2.
    """
    if warpgroups == 1 or any(x.meets for x in turn):
        return [simulate(turn, warpgroups)]
    alone = simulate(turn, 1)
    return [simulate(turn, warpgroups, lag=alone * i / _LAGS) for i in range(_LAGS)]
