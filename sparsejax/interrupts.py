"""Ctrl-C while a program starts, which Python may lose."""

import signal
import types
from typing import Any


class RememberedInterrupt:
    """Raise KeyboardInterrupt as always, and remember it, while the context is open.

    What is raised while Python collects garbage is printed and forgotten: JAX runs code there.
    """

    def __init__(self):
        self._came = False
        self._previous: Any = None

    def check(self) -> None:
        """Make up for an interrupt that was lost.

        Raises:
          KeyboardInterrupt: if there was one.
        """
        if self._came:
            raise KeyboardInterrupt

    def __enter__(self) -> "RememberedInterrupt":
        self._previous = signal.getsignal(signal.SIGINT)
        # A background process of a shell ignores it.
        if self._previous != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _remember(self, _number: int, _frame: types.FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt
