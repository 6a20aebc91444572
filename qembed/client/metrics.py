"""Parses /metrics and computes rates and quantiles between two scrapes. Pure functions of text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
LATENCIES = ("qembed_request_seconds", "vllm:e2e_request_latency_seconds")

Samples = Mapping[str, Mapping[frozenset[tuple[str, str]], float]]


@dataclass(frozen=True)
class Reading:
    """A server's state at one moment.

    Attributes:
        memory_bytes, planned_bytes: in use, and planned; None if the server is not qembed's.
        running, waiting: texts in the engine, and in its queue.
        tokens_per_second, texts_per_second: since the previous scrape; None for the first.
        latency: seconds by quantile ("p50", "p90", "p99") of requests since the previous scrape, or of all.
        cache_used: share of the KV cache in use, 0 to 1.
        requests: number of answers by HTTP status.
        restarts, nonfinite: number of engine restarts, and of vectors with NaN or infinity.
    """

    memory_bytes: int | None
    planned_bytes: int | None
    running: int
    waiting: int
    tokens_per_second: float | None
    texts_per_second: float | None
    latency: dict[str, float | None] = field(default_factory=dict)
    cache_used: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    nonfinite: int = 0

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return asdict(self)


def parse(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Prometheus's text format: values by metric and labels. Unknown lines, NaN and infinity are skipped."""
    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
    for line in text.splitlines():
        if (matched := LINE.match(line)) is None:
            continue
        name, labels, value = matched.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            samples[name][frozenset(LABEL.findall(labels or ""))] = number
    return dict(samples)


def read(now: Samples, before: Samples | None, seconds: float) -> Reading:
    """The state at the scrape `now`, with rates relative to `before`, `seconds` earlier."""
    memory, planned = total(now, "qembed_memory_bytes"), total(now, "qembed_planned_bytes", part="total")
    return Reading(
        memory_bytes=None if memory is None else int(memory),
        planned_bytes=None if planned is None else int(planned),
        running=int(total(now, "vllm:num_requests_running") or 0),
        waiting=int(total(now, "vllm:num_requests_waiting") or 0),
        tokens_per_second=_rate("vllm:prompt_tokens_total", now, before, seconds),
        texts_per_second=_rate("vllm:request_success_total", now, before, seconds),
        latency=_latency(now, before),
        cache_used=max(now.get("vllm:kv_cache_usage_perc", {}).values(), default=0.0),
        requests={dict(labels).get("status", ""): int(value) for labels, value in now.get("qembed_requests_total", {}).items()},
        restarts=int(total(now, "qembed_restarts") or 0),
        nonfinite=int(total(now, "qembed_nonfinite_vectors_total") or 0),
    )


def total(samples: Samples, name: str, **labels: str) -> float | None:
    """The sum of a metric over all label sets that include `labels`; None if there are none."""
    wanted = set(labels.items())
    values = [value for labels, value in samples.get(name, {}).items() if wanted <= labels]
    return sum(values) if values else None


def quantile(buckets: Mapping[float, float], part: float) -> float | None:
    """A quantile of a histogram given as cumulative counts by upper bound, linear within buckets; None if it is empty.

    Values beyond the last finite bound are reported as that bound, as in Prometheus.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    wanted = part * buckets[bounds[-1]]
    low, under = 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - under) / (count - under) if count > under else bound
        low, under = bound, count
    return low


def _latency(now: Samples, before: Samples | None) -> dict[str, float | None]:
    name = next((name for name in LATENCIES if f"{name}_bucket" in now), LATENCIES[0])
    buckets = _buckets(now, name)
    if before is not None:
        old = _buckets(before, name)
        fresh = {bound: count - old.get(bound, 0) for bound, count in buckets.items()}
        buckets = fresh if max(fresh.values(), default=0) > 0 and min(fresh.values()) >= 0 else buckets
    return {f"p{part:.0f}": quantile(buckets, part / 100) for part in (50, 90, 99)}


def _buckets(samples: Samples, name: str) -> dict[float, float]:
    buckets: dict[float, float] = defaultdict(float)
    for labels, value in samples.get(f"{name}_bucket", {}).items():
        with suppress(KeyError, ValueError):  # another kind of server
            buckets[float(dict(labels)["le"])] += value
    return buckets


def _rate(name: str, now: Samples, before: Samples | None, seconds: float) -> float | None:
    if before is None or seconds <= 0:
        return None
    return max(0.0, (total(now, name) or 0) - (total(before, name) or 0)) / seconds
