"""Turn the signals that end a process into a request that the loop can honour."""

import signal
import types
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Remember SIGTERM, SIGINT and SIGHUP while the context is open.

    The first signal only sets `signal_name`. A second one ends the process at once, whatever it
    does: files are put in place whole. A signal that is ignored, as under nohup, stays ignored.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
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
