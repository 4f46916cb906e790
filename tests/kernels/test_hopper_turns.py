"""Two warpgroups take turns, whichever has more steps."""

import itertools
import types

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from pallas_kernels.hopper.turns import Turns


def _list_events(warpgroup, steps, others, monkeypatch):
    """List what a warpgroup does: "products" of a step, and waits and arrivals by barrier."""
    events = []
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: events.append(("wait", barrier)))
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: events.append(("arrive", barrier)))
    barriers = types.SimpleNamespace(at=range(2))
    turns = Turns(barriers, warpgroup, steps, others)
    for step in range(steps):
        turns.take(step)
        events.append(("products", step))
        turns.hand_over(step)
    return events


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("steps", list(itertools.product(range(4), repeat=2)))
def test_nobody_waits_for_ever_and_no_arrival_is_missed(steps, first, monkeypatch):
    events = [_list_events(w, steps[w], steps[1 - w], monkeypatch) for w in range(2)]
    arrived, done = [0, 0], []
    # One goes ahead as far as it can, then the other.
    runner, stuck = first, 0
    while any(events):
        if not events[runner] or (events[runner][0][0] == "wait" and not arrived[runner]):
            runner, stuck = 1 - runner, stuck + 1
            assert stuck < 2, f"both wait, with {events} to go"
            continue
        stuck = 0
        kind, what = events[runner].pop(0)
        if kind == "products":
            done.append((what, runner))
            continue
        assert what == (runner if kind == "wait" else 1 - runner)
        arrived[what] += 1 if kind == "arrive" else -1
        assert arrived[what] <= 1, "an arrival came before the last was waited for"
    assert arrived == [0, 0]
    both = min(steps)
    # As long as both have steps, they alternate, and the first begins.
    assert done[: 2 * both] == [(step, w) for step in range(both) for w in range(2)]
