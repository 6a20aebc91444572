"""Signals that end a command: Ctrl-C, and SIGTERM, which init systems and containers send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Interrupts:
    """Turns SIGTERM into KeyboardInterrupt, like SIGINT, and remembers which signal came.

    Attributes:
        signal: its number; a command ended by it exits with 128 + number.
    """

    signal: int = signal.SIGINT

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise KeyboardInterrupt for both signals inside the block; restores the previous handlers. Main thread only."""
        before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: object) -> NoReturn:
        self.signal = number
        raise KeyboardInterrupt
