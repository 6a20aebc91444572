"""Overload: how many texts the server has admitted, when it answers 503, and what Retry-After then says."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qembed.serve.gate.errors import Refused
from qembed.text.display import counted

WINDOW = 10.0  # seconds
MAX_WAIT = 60  # seconds; the openai client ignores a longer Retry-After
DEFAULT_WAIT = 10
BODIES = 4
ANSWERS = 2
SMALL = 2**16
"""So many bytes of each body are not counted, so that large bodies turn no small one away; --max-connections bounds them."""


class Load:
    """Admitted texts that are not answered yet, at most `limit`, and the bytes of requests and answers in memory.

    `seconds` is the time that a body may take to arrive, and `max_answer` the bytes of the largest answer.
    """

    def __init__(
        self,
        limit: int,
        max_body: int,
        seconds: float = 30.0,
        max_answer: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.texts = 0
        self.requests = 0
        self.body_bytes = 0
        self.answer_bytes = 0
        self.draining = False
        self._max_bytes = BODIES * max_body
        self._max_answers = max(self._max_bytes, ANSWERS * max_answer)
        self._seconds = seconds
        self._clock = clock
        self._bodies: list[float] = []  # when each large body began
        self._completed: deque[tuple[float, float, int]] = deque()  # start, end, texts

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Reserves memory for a body; call the yielded function with each chunk's size.

        Raises:
            Refused: 503, the bodies in memory, less SMALL bytes of each, exceed four times --max-body in all.
        """
        size = reserved = 0
        start = self._clock()

        def reserve(chunk: int) -> None:
            nonlocal size, reserved
            size += chunk
            more = max(0, size - SMALL) - reserved
            if self.body_bytes + more > self._max_bytes:
                raise self.busy("too many large requests at once", self._seconds_until_a_body_leaves())
            if more and not reserved:
                self._bodies.append(start)
            self.body_bytes += more
            reserved += more

        try:
            yield reserve
        finally:
            self.body_bytes -= reserved
            if reserved:
                self._bodies.remove(start)

    @contextmanager
    def answer(self, size: int) -> Iterator[None]:
        """Reserves memory for an answer of about `size` bytes until the client has taken it.

        Raises:
            Refused: 503, the answers in memory exceed four times --max-body, and twice the largest answer, in all.
        """
        if self.answer_bytes + size > self._max_answers:
            raise self.busy("too many large answers at once")
        self.answer_bytes += size
        self.requests += 1
        try:
            yield
        finally:
            self.answer_bytes -= size
            self.requests -= 1

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
                f"{counted(self.texts, 'text')} waiting or being computed, {texts} more would exceed --max-queue {self.limit}",
                self.seconds_until_room(texts),
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

    def seconds_until_room(self, texts: int | None = None) -> int:
        """Whole seconds, 1 to 60, until there is room for `texts` at the rate of the last ten seconds; None: all the room."""
        leaving = self.texts if texts is None else self.texts + texts - self.limit
        now = self._clock()
        while len(self._completed) > 1 and self._completed[0][1] < now - WINDOW:
            self._completed.popleft()
        if not self._completed:
            return DEFAULT_WAIT if self.texts else 1
        first = min(start for start, _, _ in self._completed)
        last = max(end for _, end, _ in self._completed)
        rate = sum(texts for _, _, texts in self._completed) / max(0.1, last - first)
        return min(MAX_WAIT, max(1, math.ceil(leaving / rate)))

    def _seconds_until_a_body_leaves(self) -> int:
        """Whole seconds until the first of the large bodies has arrived or is given up."""
        now = self._clock()
        arriving = [start + self._seconds - now for start in self._bodies if start + self._seconds > now]
        return max(1, math.ceil(min(arriving))) if arriving else self.seconds_until_room()

    def busy(self, cause: str, seconds: int | None = None) -> Refused:
        """503 of a full server; `cause` names what is full, `seconds` is the Retry-After."""
        wait = self.seconds_until_room() if seconds is None else min(MAX_WAIT, seconds)
        return Refused(503, f"busy: {cause}", "busy", None, {"retry-after": str(wait)})

    def stopping(self) -> Refused:
        """503 of a server that is stopping."""
        return Refused(503, "this server is being stopped", "stopping", None, {"retry-after": "5", "connection": "close"})
