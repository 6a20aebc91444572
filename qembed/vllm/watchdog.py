"""Whether an engine that lives still works: texts wait, and nothing comes of it.

An engine can hang without ending: stopped, deadlocked, or waiting for a device that does not answer. vLLM's own /health does
not see that. A computation that only takes long is told apart by what it does: each step of the engine changes one of SIGNS,
and in between it keeps a core busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from qembed.client import metrics

IN_FLIGHT = "qembed_texts_in_flight"
SIGNS = (
    "qembed_texts_total",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
"""What moves while an engine works, and only then: requests that come, are refused or given up move none of them."""
IDLE = 0.05
"""Part of a core; a process that uses less is waiting."""
BUSY_FACTOR = 10
"""How much longer an engine may take that keeps a core busy: one step of a large model on a slow CPU takes minutes."""


@dataclass(frozen=True)
class Look:
    """A moment of a server: texts in it, and the values of SIGNS; `cpu` is the seconds of CPU time that its engine has used.

    None for `texts` says that the server did not answer, and `cpu` is its own then. None for `cpu`: the system does not tell.
    """

    texts: int | None
    signs: tuple[float | None, ...]
    cpu: float | None


def look(text: str, cpu: float | None) -> Look:
    """What a server's /metrics say."""
    samples = metrics.parse(text)
    texts = metrics.total(samples, IN_FLIGHT)
    return Look(int(texts or 0), tuple(metrics.total(samples, name) for name in SIGNS), cpu)


class Watchdog:
    """Told how the server looks every now and then, it says when that has been the same for `timeout` seconds too long."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._seconds = 0.0  # that it has looked the same
        self._seen = clock()
        self._last: Look | None = None

    def hung(self, now: Look) -> str | None:
        """What is wrong, if the server hangs: longer than the timeout, or BUSY_FACTOR times as long with a core busy.

        A pause between two looks counts no more than a third of the timeout: all of the machine may have been stopped.
        """
        last, seen = self._last, self._seen
        self._seen = self._clock()
        waits = now.texts is None or now.texts > 0
        if last is None or not waits or (now.texts is None) != (last.texts is None) or now.signs != last.signs:
            self._last, self._seconds = now, 0.0
            return None
        self._seconds += min(self._seen - seen, self._timeout / 3)
        seconds = self._seconds
        idle = now.cpu is not None and last.cpu is not None and now.cpu - last.cpu < IDLE * seconds
        if seconds < self._timeout * (1 if idle else BUSY_FACTOR):
            return None
        if now.texts is None:
            return f"vLLM hangs: it has not answered for {seconds:.0f} s (--hang-timeout)"
        return f"vLLM hangs: {now.texts} texts wait, and nothing was computed for {seconds:.0f} s (--hang-timeout)"
