"""How many texts are in the server, how fast they leave it, and so when to come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qembed.serve.gate.errors import Refused

WINDOW = 10.0
LONGEST_WAIT = 60  # an openai client waits no longer than this for what Retry-After says
UNKNOWN = 10
BODIES = 4


class Load:
    """The texts that were let in and are not answered yet, at most `limit`; and the bytes of requests being read."""

    def __init__(self, limit: int, max_body: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.texts = 0
        self.requests = 0
        self.body_bytes = 0
        self.draining = False
        self._max_bytes = BODIES * max_body
        self._clock = clock
        self._left: deque[tuple[float, float, int]] = deque()

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Room for a request while it is in memory; call what is given with the bytes of each part that comes.

        Raises:
            Refused: 503, the requests in memory are larger together than four of the largest that is allowed.
        """
        held = 0

        def add(size: int) -> None:
            nonlocal held
            if self.body_bytes + size > self._max_bytes:
                raise self.busy("too many large requests at once")
            self.body_bytes += size
            held += size

        try:
            yield add
        finally:
            self.body_bytes -= held

    @contextmanager
    def admitted(self, texts: int) -> Iterator[None]:
        """A place for `texts` texts until they are answered: for all of them, or for none.

        Raises:
            Refused: 503, the server is full or is being stopped.
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
            self._left.append((start, self._clock(), texts))

    def seconds_until_room(self) -> int:
        """Whole seconds until what is here now will have been computed, at the rate of what left in the last ten; 1 to 60."""
        now = self._clock()
        while len(self._left) > 1 and self._left[0][1] < now - WINDOW:
            self._left.popleft()
        if not self._left:
            return UNKNOWN if self.texts else 1
        first = min(start for start, _, _ in self._left)
        last = max(end for _, end, _ in self._left)
        rate = sum(texts for _, _, texts in self._left) / max(0.1, last - first)
        return min(LONGEST_WAIT, max(1, math.ceil(self.texts / rate)))

    def busy(self, why: str) -> Refused:
        """The answer of a full server."""
        return Refused(503, f"busy: {why}", "busy", None, {"retry-after": str(self.seconds_until_room())})

    def stopping(self) -> Refused:
        """The answer of a server that is being stopped, to requests that came after the signal."""
        return Refused(503, "this server is being stopped", "stopping", None, {"retry-after": "5", "connection": "close"})
