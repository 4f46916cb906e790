"""Turn the signals that end a process into a request that the loop can honour."""

import os
import signal
import types
from typing import Any

from jax.experimental import multihost_utils

from sparsejax.processes import count

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Remember SIGTERM, SIGINT and SIGHUP while the context is open.

    The first signal only sets `signal_name`. A second one ends the process at once, whatever it
    does: files are put in place whole. A signal that is ignored, as under nohup, stays ignored.

    Of several processes each may get the signal, and all stop after the same step. JAX sees to
    that: it watches SIGTERM, where a handler of Python's would take its place. So the other two are
    turned into SIGTERM, and a second SIGTERM does nothing.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def find_cause(self, step: int) -> str | None:
        """Return what ends the run after a step, the same step on all processes: a signal's name.

        Of several processes only one may have got it: then that is all that is said.

        Args:
          step: that was trained, asked for once.
        """
        if count() == 1:
            return self.signal_name
        is_due = multihost_utils.reached_preemption_sync_point(step)
        return (self.signal_name or "a signal to one of the processes") if is_due else None

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS if count() == 1 else (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        for handled in self._previous:
            signal.signal(handled, signal.SIG_DFL)
        if count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
