"""Signals that ask a process to stop, as exceptions that unwind, or as a mark that a loop looks at."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 130, 143

# batch schedulers send SIGUSR1 some time before they kill
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Terminated(BaseException):
    """Report SIGTERM or SIGUSR1, as KeyboardInterrupt reports SIGINT: no `except Exception` stops it."""


class StopSignals:
    """Catch SIGINT, SIGTERM and SIGUSR1 while a `with` block runs.

    The first of them raises at once, or only sets `received` for a loop that calls `check` where it can stop.
    A second one ends the process without more ado, with the exit code of the first. Python looks at signals
    between its own steps, so a long native call delays both.

    Signals that are ignored stay so (background jobs, nohup), and so do those that a C library handles. Where
    the block is left, the handlers from before are back. Blocks nest: the inner one gets the signals, and the
    outer one takes the next signal for a second one. Outside of the main thread, where Python
    allows no handlers, nothing is caught.

    Attributes:
        received: number of the first signal, None before there is one.
    """

    def __init__(self, *, raise_at_once: bool) -> None:
        """Catch nothing yet.

        Args:
            raise_at_once: raise from wherever the process is when the first signal comes; otherwise only
                `check` raises.
        """
        self.received: int | None = None
        self._raise_at_once = raise_at_once
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                before = signal.getsignal(number)
                # None is a handler that Python did not install and could not put back
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the handlers from before back."""
        for number, before in self._before.items():
            outer = getattr(before, "__self__", None)
            if isinstance(outer, StopSignals) and outer.received is None:
                outer.received = self.received
            signal.signal(number, before)
        self._before.clear()

    @property
    def exit_code(self) -> int:
        """Return what a process that stops now has to exit with: 130, 143, or 0 before there is a signal."""
        if self.received is None:
            return 0
        return INTERRUPTED if self.received == signal.SIGINT else TERMINATED

    def check(self) -> None:
        """Do nothing before there is a signal.

        Raises:
            KeyboardInterrupt: SIGINT was received.
            Terminated: SIGTERM or SIGUSR1 was received.
        """
        if self.received is not None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(self.exit_code)
        self.received = number
        if self._raise_at_once:
            self.check()
