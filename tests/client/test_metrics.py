"""Readings of a server's /metrics."""

from __future__ import annotations

import pytest

from qembed.client import metrics

BEFORE = """\
# HELP vllm:prompt_tokens_total Tokens.
vllm:prompt_tokens_total{engine="0",model_name="m"} 1000.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 1000.0
vllm:request_success_total{engine="0",finished_reason="stop"} 10
qembed_request_seconds_bucket{le="0.1"} 10
qembed_request_seconds_bucket{le="1.0"} 10
qembed_request_seconds_bucket{le="+Inf"} 10
"""
NOW = """\
vllm:prompt_tokens_total{engine="0",model_name="m"} 1500.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 1700.0
vllm:request_success_total{engine="0",finished_reason="stop"} 30
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_waiting{engine="0"} 4
vllm:kv_cache_usage_perc{engine="0"} 0.25
qembed_request_seconds_bucket{le="0.1"} 10
qembed_request_seconds_bucket{le="1.0"} 18
qembed_request_seconds_bucket{le="+Inf"} 20
qembed_requests_total{status="200"} 29.0
qembed_requests_total{status="503"} 1.0
qembed_memory_bytes 2.0e+09
qembed_planned_bytes{part="total"} 1.9e+09
qembed_planned_bytes{part="kv_cache"} 9e+08
not a line
qembed_broken{x="} y
"""


def test_a_reading_has_rates_since_the_previous_one() -> None:
    reading = metrics.read(metrics.parse(NOW), metrics.parse(BEFORE), 2.0)
    assert (reading.tokens_per_second, reading.texts_per_second) == (600, 10)
    assert (reading.running, reading.waiting, reading.cache_used) == (3, 4, 0.25)
    assert (reading.memory_bytes, reading.planned_bytes) == (2 * 10**9, 19 * 10**8)
    assert reading.requests == {"200": 29, "503": 1}
    assert reading.latency["p50"] == pytest.approx(0.1 + 0.9 * 5 / 8)
    assert reading.latency["p99"] == 1.0


def test_the_first_reading_has_total_latency_and_no_rates() -> None:
    reading = metrics.read(metrics.parse(BEFORE), None, 0)
    assert reading.tokens_per_second is None
    assert reading.latency["p50"] == pytest.approx(0.05)


def test_counters_of_a_restarted_server_start_at_zero() -> None:
    reading = metrics.read(metrics.parse(BEFORE), metrics.parse(NOW), 2.0)
    assert reading.tokens_per_second == 0
    assert reading.latency["p50"] == pytest.approx(0.05)


def test_a_server_without_qembeds_metrics_has_vllms() -> None:
    text = 'vllm:e2e_request_latency_seconds_bucket{le="0.5"} 4\nvllm:e2e_request_latency_seconds_bucket{le="+Inf"} 4\n'
    reading = metrics.read(metrics.parse(text), None, 0)
    assert reading.latency["p50"] == 0.25
    assert reading.memory_bytes is None


def test_without_measurements_there_is_no_quantile() -> None:
    assert metrics.quantile({}, 0.5) is None
    assert metrics.quantile({1.0: 0, float("inf"): 0}, 0.5) is None
