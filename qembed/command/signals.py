"""What ends a command from outside: Ctrl-C, and SIGTERM, which init systems and containers send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Interrupts:
    """Makes SIGTERM the KeyboardInterrupt that SIGINT is, and remembers which of them came.

    Attributes:
        signal: its number; a command that one has ended exits with 128 more.
    """

    signal: int = signal.SIGINT

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise them inside the block; behind it they do what they did before. Only in the main thread."""
        before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: object) -> NoReturn:
        self.signal = number
        raise KeyboardInterrupt
