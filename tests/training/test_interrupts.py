"""Ctrl-C is not lost, wherever it arrives while a command starts."""

import gc
import os
import signal

import pytest

from sparsejax.interrupts import RememberedInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_forgets_is_made_up_for():
    def interrupt(phase, _info):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with RememberedInterrupt() as remembered:
        gc.callbacks.append(interrupt)
        try:
            gc.collect()  # which prints what is raised within, and goes on
        finally:
            gc.callbacks.remove(interrupt)
        with pytest.raises(KeyboardInterrupt):
            remembered.check()
    assert signal.getsignal(signal.SIGINT) == before


def test_without_an_interrupt_nothing_is_raised():
    with RememberedInterrupt() as remembered:
        remembered.check()
