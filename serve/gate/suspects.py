"""Which texts were in the engine when it died, so that a text that ends it twice is refused the third time.

Whatever ends the engine also ends the process of the gate. So the table of texts in flight is in a file that the supervisor
keeps open from one start to the next (without a name, so it vanishes with the supervisor). A process that finds texts in flight
there when it starts counts a death for each of them. The file holds keyed hashes, no texts, and has a fixed size.

All texts in flight at a death are suspects, most of them innocent. Therefore the gate computes suspects one at a time: the
second death has one suspect in flight, and a suspect that gets its vector is one no more.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_DEATHS = 2
"""A text that was in flight alone at so many deaths is refused."""
DIGEST = 15  # bytes; with the state a slot has 16
SLOT = DIGEST + 1
IN_FLIGHT = 0x80
"""Bit of a slot's state; the others are the number of deaths."""


class Suspects:
    """The texts in flight, in the file `descriptor` with room for `slots` texts; None: in memory, lost with the process."""

    def __init__(self, slots: int, descriptor: int | None = None) -> None:
        size = SLOT * (1 + slots)
        if descriptor is not None and os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._table = mmap.mmap(-1 if descriptor is None else descriptor, size)
        if not any(self._table[:SLOT]):
            self._table[:SLOT] = os.urandom(SLOT)
        self._key = self._table[:SLOT]
        self._free: list[int] = []
        self._slots: dict[bytes, int] = {}
        self._suspects: set[bytes] = set()
        self._count = [0] * (1 + slots)
        for slot in range(slots, 0, -1):
            self._restore(slot)

    def deaths(self, text: str | Sequence[int]) -> int:
        """At how many deaths of the engine `text` was in flight; less than MAX_DEATHS unless it was the only suspect."""
        if not self._suspects:
            return 0
        digest = self._hash(text)
        return self._table[self._state(self._slots[digest])] & ~IN_FLIGHT if digest in self._suspects else 0

    @contextmanager
    def in_flight(self, texts: Iterable[str | Sequence[int]]) -> Iterator[Flight]:
        """Note `texts` as in flight within the block. They stay noted where the block marks the engine as dead."""
        flight = Flight()
        slots = [slot for text in texts if (slot := self._take(text)) is not None]
        try:
            yield flight
        finally:
            if not flight.died:
                for slot in slots:
                    self._release(slot, cleared=flight.answered)

    def _restore(self, slot: int) -> None:
        """Count a death for the text of `slot` if it is in flight from the process before this one."""
        digest, state = self._table[SLOT * slot : self._state(slot)], self._table[self._state(slot)]
        if state & IN_FLIGHT:
            state = min(MAX_DEATHS, (state & ~IN_FLIGHT) + 1)
            self._table[self._state(slot)] = state
        if state:
            self._slots[digest] = slot
            self._suspects.add(digest)
        else:
            self._free.append(slot)

    def _take(self, text: str | Sequence[int]) -> int | None:
        digest = self._hash(text)
        slot = self._slots.get(digest)
        if slot is None:
            slot = self._free.pop() if self._free else self._some_suspect()
            if slot is None:
                return None
            self._slots[digest] = slot
            self._table[SLOT * slot : self._state(slot)] = digest
        self._count[slot] += 1
        self._table[self._state(slot)] |= IN_FLIGHT
        return slot

    def _release(self, slot: int, *, cleared: bool) -> None:
        self._count[slot] -= 1
        if self._count[slot]:
            return
        state = self._table[self._state(slot)] & ~IN_FLIGHT
        if cleared:
            state = 0
        self._table[self._state(slot)] = state
        if not state:
            digest = self._table[SLOT * slot : self._state(slot)]
            del self._slots[digest]
            self._suspects.discard(digest)
            self._free.append(slot)

    def _some_suspect(self) -> int | None:
        """Forget a text that was in flight at one death only, and return its slot; None if there is none."""
        for digest in self._suspects:
            slot = self._slots[digest]
            if self._table[self._state(slot)] == 1:
                del self._slots[digest]
                self._suspects.discard(digest)
                self._table[self._state(slot)] = 0
                return slot
        return None

    def _hash(self, text: str | Sequence[int]) -> bytes:
        content = text if isinstance(text, str) else json.dumps(text)
        return hashlib.blake2b(content.encode(), digest_size=DIGEST, key=self._key).digest()

    @staticmethod
    def _state(slot: int) -> int:
        return SLOT * slot + DIGEST


class Flight:
    """How the computation of some texts ended: `answered` if they got vectors, `died` if the engine is dead."""

    answered = False
    died = False
