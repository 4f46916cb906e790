"""Two warpgroups take turns, whichever has more steps."""

import itertools
import types

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from pallas_kernels.hopper.turns import Turns


def _list_events(warpgroup, rounds, monkeypatch):
    """List what a warpgroup does in rounds of (own steps, steps of the other).

    Returns:
      list of ("products", (round, step)), and of waits and arrivals by barrier.
    """
    events = []
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: events.append(("wait", barrier)))
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: events.append(("arrive", barrier)))
    barriers = types.SimpleNamespace(at=range(2))
    Turns(barriers, warpgroup).begin()
    first = 0
    for number, (steps, others) in enumerate(rounds):
        turns = Turns(barriers, warpgroup, first + min(steps, others))
        for step in range(first, first + steps):
            turns.take(step)
            events.append(("products", (number, step - first)))
            turns.hand_over(step)
        first += steps
    Turns(barriers, warpgroup).end()
    return events


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("rounds", list(itertools.product(range(3), repeat=4)))
def test_nobody_waits_for_ever_and_no_arrival_is_missed(rounds, ahead, monkeypatch):
    rounds = list(itertools.batched(rounds, 2))
    events = [
        _list_events(w, [(own[w], own[1 - w]) for own in rounds], monkeypatch) for w in range(2)
    ]
    arrived, done = [0, 0], []
    # One goes ahead as far as it can, then the other.
    runner, stuck = ahead, 0
    while any(events):
        if not events[runner] or (events[runner][0][0] == "wait" and not arrived[runner]):
            runner, stuck = 1 - runner, stuck + 1
            assert stuck < 2, f"both wait, with {events} to go"
            continue
        stuck = 0
        kind, what = events[runner].pop(0)
        if kind == "products":
            done.append((*what, runner))
            continue
        arrived[what] += 1 if kind == "arrive" else -1
        assert arrived[what] <= 1, "an arrival came before the last was waited for"
    assert arrived == [0, 0]
    # As long as both have steps of a round, they alternate, and the first begins.
    common = [(number, step) for number, own in enumerate(rounds) for step in range(min(own))]
    assert [x for x in done if x[:2] in common] == [(*x, w) for x in common for w in range(2)]


def test_equal_lists_need_no_end_and_no_barriers_mean_no_turns(monkeypatch):
    def list_events(warpgroup, barriers):
        events = []
        monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: events.append(barrier))
        monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: events.append(barrier))
        turns = Turns(barriers, warpgroup)
        turns.begin()
        turns.take(100)
        turns.hand_over(100)
        turns.end()
        return events

    barriers = types.SimpleNamespace(at=range(2))
    assert [list_events(w, barriers) for w in range(2)] == [[0, 1, 0], [0, 1, 0]]
    assert [list_events(w, None) for w in range(2)] == [[], []]
