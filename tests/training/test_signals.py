"""A signal asks a run to stop; a second one ends it."""

import os
import signal
import subprocess
import sys

import pytest

from sparsejax.training.signals import StopRequest

_TWICE = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
from sparsejax.training.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), int(sys.argv[1]))
    print(stop.signal_name, flush=True)
    try:
        os.kill(os.getpid(), int(sys.argv[2]))
    finally:
        print("still here")
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGINT),
        pytest.param(signal.SIGINT, signal.SIGHUP, marks=pytest.mark.ci),
        pytest.param(signal.SIGHUP, signal.SIGTERM, marks=pytest.mark.ci),
    ],
)
def test_a_second_signal_ends_the_process_whatever_it_does(first, second):
    result = subprocess.run(
        [sys.executable, "-c", _TWICE, str(int(first)), str(int(second))],
        capture_output=True,
        text=True,
    )
    assert result.returncode == -second
    assert (result.stdout, result.stderr) == (f"{first.name}\n", "")


def test_handlers_come_back_and_ignored_signals_stay_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_name is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_name == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert {number: signal.getsignal(number) for number in before} == before
