"""Turn the signals that end a process into a request that the loop can honour."""

import signal
import types
from typing import Any


class StopRequest:
    """Remember SIGTERM and SIGINT while the context is open.

    The first signal only sets `signal_name`; handlers are restored at once, so that a second
    one ends the process in the ordinary way.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._restore()

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
