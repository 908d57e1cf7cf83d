"""Ctrl-C that lets the current step finish."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Counts the Ctrl-C of its block: the first is noted, the second raises `KeyboardInterrupt`.

    Only in the main thread, which alone may handle signals, and only where Ctrl-C does what Python
    makes it do: a program with a handler of its own keeps that.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: Any = None

    def __enter__(self) -> "Interrupts":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if there has been a Ctrl-C.

        Raises:
            KeyboardInterrupt: see there.
        """
        if self.count:
            raise KeyboardInterrupt
