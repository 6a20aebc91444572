"""The gate's own metrics in /metrics. They share a registry with vLLM's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qembed import installation
from qembed.serve.gate.overload import Load
from qembed.vllm import machine
from qembed.vllm.gate_rules import Rules

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

UNNAMED = "unnamed"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


CACHED = 1.0
"""Seconds that a measured memory is shown. Reading it takes tens of milliseconds, in which no request is answered."""


class Metrics:
    """Counters that the gate increments, and gauges that are computed at each scrape."""

    def __init__(self, rules: Rules, load: Load, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Histogram
        from prometheus_client.metrics_core import GaugeMetricFamily

        self.registry = registry = registry or REGISTRY
        self.requests = Counter("qembed_requests", "Requests for vectors or scores.", ["status"], registry=registry)
        self.refused = Counter("qembed_refused", "Requests refused by the gate, by reason.", ["reason"], registry=registry)
        self.texts = Counter("qembed_texts", "Texts embedded, or pairs scored.", registry=registry)
        self.tokens = Counter("qembed_tokens", "Tokens of those texts.", registry=registry)
        self.nonfinite = Counter(
            "qembed_nonfinite_vectors",
            "Vectors or scores with NaN or infinity, even when recomputed.",
            registry=registry,
        )
        self.recomputed = Counter(
            "qembed_recomputed_vectors", "Vectors or scores recomputed because they had NaN or infinity.", registry=registry
        )
        self.seconds = Histogram(
            "qembed_request_seconds",
            "From first byte to answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._key_requests = Counter("qembed_key_requests", "Such requests, by name of key.", ["key"], registry=registry)
        self._key_texts = Counter("qembed_key_texts", "Such texts, by name of key.", ["key"], registry=registry)
        self._key_tokens = Counter("qembed_key_tokens", "Tokens of those texts, by name of key.", ["key"], registry=registry)
        family = GaugeMetricFamily
        versions = {
            "version": installation.version(),
            "vllm": machine.vllm_version(),
        }

        memory = _Cached(lambda: _memory(rules))

        class Gauges:
            """Values at the time of a scrape."""

            def collect(self) -> Iterable[Metric]:
                yield family("qembed_texts_in_flight", "Texts waiting or being computed.", load.texts)
                yield family("qembed_queue_limit", "Texts waiting or being computed, at most (--max-queue).", rules.max_queue)
                yield family("qembed_restarts", "Restarts of the engine.", rules.restarts)
                build = family("qembed_build_info", "Versions of qembed and vLLM (always 1).", labels=list(versions))
                build.add_metric([version or "" for version in versions.values()], 1)
                yield build
                serving = family("qembed_serving", "What is served (always 1).", labels=list(rules.about))
                serving.add_metric(list(rules.about.values()), 1)
                yield serving
                planned = family("qembed_planned_bytes", "The memory plan.", labels=["part"])
                for part, size in rules.plan.items():
                    planned.add_metric([part], size)
                yield planned
                if (used := memory.value()) is not None:
                    yield family("qembed_memory_bytes", "Memory in use per device: GPU memory, or resident.", used)

        registry.register(Gauges())

    def count_key(self, key: str, texts: int, tokens: int) -> None:
        """Count an answered request of the key called `key`; texts count once they have vectors, which have tokens."""
        name = key or UNNAMED
        self._key_requests.labels(name).inc()
        if tokens:
            self._key_texts.labels(name).inc(texts)
            self._key_tokens.labels(name).inc(tokens)


class _Cached:
    """The value of a function, computed anew once it is CACHED seconds old."""

    def __init__(self, function: Callable[[], int | None]) -> None:
        self._function = function
        self._value: int | None = None
        self._until = -math.inf

    def value(self) -> int | None:
        if time.monotonic() >= self._until:
            self._value = self._function()
            self._until = time.monotonic() + CACHED
        return self._value


def _memory(rules: Rules) -> int | None:
    """Bytes in use. With several devices the mean, because the plan is for one of them."""
    leader = os.getsid(0)
    if "graphs" not in rules.plan:
        used = machine.resident(leader)
    elif (used := machine.cuda_used(machine.processes(leader))) is None:
        return machine.cuda_total_used()  # of the first GPU alone
    return None if used is None else used // rules.parts
