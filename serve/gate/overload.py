"""Overload: how many texts the server has admitted, when it answers 503, and what Retry-After then says."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qembed.serve.gate.errors import Refused

WINDOW = 10.0  # seconds
MAX_WAIT = 60  # seconds; the openai client ignores a longer Retry-After
DEFAULT_WAIT = 10
BODIES = 4


class Load:
    """Admitted texts that are not answered yet, at most `limit`, and the bytes of the requests being read."""

    def __init__(self, limit: int, max_body: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.texts = 0
        self.requests = 0
        self.body_bytes = 0
        self.draining = False
        self._max_bytes = BODIES * max_body
        self._clock = clock
        self._completed: deque[tuple[float, float, int]] = deque()  # start, end, texts

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Reserves memory for a body; call the yielded function with each chunk's size.

        Raises:
            Refused: 503, the bodies in memory together exceed four times --max-body.
        """
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            if self.body_bytes + size > self._max_bytes:
                raise self.busy("too many large requests at once")
            self.body_bytes += size
            reserved += size

        try:
            yield reserve
        finally:
            self.body_bytes -= reserved

    @contextmanager
    def admitted(self, texts: int) -> Iterator[None]:
        """Admit `texts` texts until the block is left: all of them, or none.

        Raises:
            Refused: 503, the server is full or stopping.
        """
        if self.draining:
            raise self.stopping()
        if self.texts + texts > self.limit:
            raise self.busy(
                f"{self.texts} texts are waiting or being computed, {texts} more would exceed --max-queue {self.limit}"
            )
        self.texts += texts
        self.requests += 1
        start = self._clock()
        try:
            yield
        finally:
            self.texts -= texts
            self.requests -= 1
            self._completed.append((start, self._clock(), texts))

    def seconds_until_room(self) -> int:
        """Whole seconds, 1 to 60, until all admitted texts are computed at the rate of the last ten seconds."""
        now = self._clock()
        while len(self._completed) > 1 and self._completed[0][1] < now - WINDOW:
            self._completed.popleft()
        if not self._completed:
            return DEFAULT_WAIT if self.texts else 1
        first = min(start for start, _, _ in self._completed)
        last = max(end for _, end, _ in self._completed)
        rate = sum(texts for _, _, texts in self._completed) / max(0.1, last - first)
        return min(MAX_WAIT, max(1, math.ceil(self.texts / rate)))

    def busy(self, cause: str) -> Refused:
        """503 of a full server; `cause` says what is full."""
        return Refused(503, f"busy: {cause}", "busy", None, {"retry-after": str(self.seconds_until_room())})

    def stopping(self) -> Refused:
        """503 of a server that is stopping."""
        return Refused(503, "this server is being stopped", "stopping", None, {"retry-after": "5", "connection": "close"})
