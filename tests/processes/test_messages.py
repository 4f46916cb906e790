"""What processes send one another, with threads that take their places."""

import subprocess
import sys
import threading
import types

import pytest

from sparsejax import processes
from sparsejax.config.parse import ConfigError
from tests.processes.launch import ROOT


class Store:
    """The key-value store of JAX's coordination service, as far as it is used."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self._values, key
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, _timeout_in_ms):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=10), key
            return self._values[key]


class Counts(dict):
    """What each process counts by itself."""

    def __init__(self, place):
        self._place = place

    def setdefault(self, key, default):
        return super().setdefault((self._place.process_id, key), default)


@pytest.fixture
def run_all(monkeypatch):
    """Return what runs a function on three processes, and returns what each returned or raised."""
    place = threading.local()
    store = Store()

    class State:
        num_processes, client = 3, store
        process_id = property(lambda _: place.process_id)

    monkeypatch.setattr(processes, "distributed", types.SimpleNamespace(global_state=State()))
    monkeypatch.setattr(processes, "_counts", Counts(place))

    def run(function):
        outcomes = [None] * 3

        def call(process):
            place.process_id = process
            try:
                outcomes[process] = function(process)
            except Exception as error:
                outcomes[process] = error

        threads = [threading.Thread(target=call, args=(process,)) for process in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


def test_the_first_decides_for_all(run_all):
    asked = []

    def decide(process):
        def ask():
            asked.append(process)
            return {"step": 3, "loss": float("inf")}

        return [processes.decide(ask), processes.decide(lambda: process)]

    assert run_all(decide) == [[{"step": 3, "loss": float("inf")}, 0]] * 3
    assert asked == [0]


@pytest.mark.parametrize(
    "error", [ConfigError("num_steps must be 1"), OSError(28, "No space left on device")]
)
def test_what_the_first_refuses_all_refuse_alike(run_all, error):
    def refuse():
        raise error

    outcomes = run_all(lambda _: processes.decide(refuse))
    assert [(type(x), str(x)) for x in outcomes] == [(type(error), str(error))] * 3
    assert all(processes.is_shared(x) for x in outcomes)


def test_an_error_that_is_raised_from_a_shared_one_is_shared():
    wrapped = ConfigError("of all")
    wrapped.__cause__ = processes.share(ValueError("of all"))
    assert processes.is_shared(wrapped) and not processes.is_shared(ConfigError("of one"))


def test_values_come_to_the_first_in_order_and_differences_are_named(run_all):
    assert run_all(lambda process: processes.collect("files", process)) == [[0, 1, 2], [], []]
    assert run_all(lambda _: processes.agree("data", {"a": 1})) == [None] * 3
    outcomes = run_all(lambda process: processes.agree("data", {"a": {"b": process // 2}}))
    told = "all processes must have the same data, got a.b=0 in process 0 and 1 in process 2"
    assert [str(outcome) for outcome in outcomes] == [told] * 3


def test_the_first_goes_through_alone_and_the_others_follow_even_if_it_fails(run_all):
    order = []

    def build(process):
        with processes.first_alone("data"):
            order.append(process)
            if process == 0:
                raise ValueError("damaged")

    outcomes = run_all(build)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]
    assert str(outcomes[0]) == "damaged" and outcomes[1:] == [None, None]


def test_one_process_sends_nothing(monkeypatch):
    monkeypatch.setattr(processes, "_client", lambda: pytest.fail("it has nobody to send to"))
    assert processes.decide(lambda: (1, 2)) == (1, 2)
    assert processes.collect("files", 3) == [3]
    processes.wait_for_all("place")
    processes.agree("data", {"a": 1})
    processes.leave(5)
    with processes.first_alone("data"):
        pass


_WRONG_FLAGS = [
    ("--num_processes=2", "must be given together, got no --coordinator and no --process_id"),
    ("--distributed --process_id=0", "give it, or those, not both"),
    ("--distributed --mode=plan", "--mode=plan must have one process"),
    ("--coordinator=host --num_processes=2 --process_id=0", "a port below 65536, got 'host'"),
    ("--coordinator=h:1 --num_processes=2 --process_id=2", "from 0 to 1, got 2"),
]


def test_wrong_flags_are_refused_in_one_line():
    program = f"""
import sys
from absl import flags
from sparsejax import command
for text in {[text for text, _ in _WRONG_FLAGS]!r}:
    flags.FLAGS.unparse_flags()
    for name in ("distributed", "coordinator", "num_processes", "process_id", "mode"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["train.py", *text.split()])
    print(command._find_wrong_process_flag())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(_WRONG_FLAGS)
    for line, (_, told) in zip(lines, _WRONG_FLAGS, strict=True):
        assert told in line
