"""Detects an engine that hangs: its process lives and texts wait, but nothing is computed.

An engine can hang when it is stopped, deadlocked, or waits for a device that does not answer. vLLM's /health does not notice.
A slow computation differs from a hang: each step of the engine changes one of PROGRESS, and during a step it keeps a core
busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from qembed.client import metrics
from qembed.text.display import counted

IN_FLIGHT = "qembed_texts_in_flight"
PROGRESS = (
    "qembed_texts_total",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
"""Metrics that change only while the engine works; new, refused or cancelled requests do not change them."""
IDLE = 0.05
"""Share of a core; a process that uses less is waiting."""
BUSY_FACTOR = 10
"""An engine that keeps a core busy may take so many times longer: a step of a large model on a slow CPU takes minutes."""


@dataclass(frozen=True)
class Observation:
    """The state of a server at a moment.

    Attributes:
        texts: texts waiting or being computed; None if the server did not answer.
        progress: the values of PROGRESS.
        cpu: CPU seconds used by the engine, or by the server if it did not answer; None if unknown.
    """

    texts: int | None
    progress: tuple[float | None, ...]
    cpu: float | None


def observe(text: str, cpu: float | None) -> Observation:
    """The observation from the text of a server's /metrics."""
    samples = metrics.parse(text)
    texts = metrics.total(samples, IN_FLIGHT)
    return Observation(int(texts or 0), tuple(metrics.total(samples, name) for name in PROGRESS), cpu)


class Watchdog:
    """Compares successive observations of a server, and reports a hang when nothing changes for `timeout` seconds."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._unchanged = 0.0  # seconds
        self._observed = clock()
        self._last: Observation | None = None

    def check(self, now: Observation) -> str | None:
        """A message if the server hangs: for longer than the timeout, or BUSY_FACTOR times as long with a core busy.

        The time between two observations counts at most a third of the timeout, because the whole machine may have been
        suspended.
        """
        last, previous = self._last, self._observed
        self._observed = self._clock()
        waits = now.texts is None or now.texts > 0
        if last is None or not waits or (now.texts is None) != (last.texts is None) or now.progress != last.progress:
            self._last, self._unchanged = now, 0.0
            return None
        self._unchanged += min(self._observed - previous, self._timeout / 3)
        seconds = self._unchanged
        idle = now.cpu is not None and last.cpu is not None and now.cpu - last.cpu < IDLE * seconds
        if seconds < self._timeout * (1 if idle else BUSY_FACTOR):
            return None
        if now.texts is None:
            return f"vLLM hangs: it has not answered for {seconds:.0f} s (--hang-timeout)"
        return (
            f"vLLM hangs: {counted(now.texts, 'text')} waiting, and nothing was computed for {seconds:.0f} s (--hang-timeout)"
        )
