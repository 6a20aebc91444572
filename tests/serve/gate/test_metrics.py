"""The gate's metrics, as Prometheus reads them."""

from __future__ import annotations

import pytest

from qembed.serve.gate.metrics import Metrics
from qembed.serve.gate.overload import Load
from qembed.vllm import machine
from qembed.vllm.gate_rules import Rules

CPU = {"linear": 7, "total": 9}
GPU = {**CPU, "graphs": 1}


def memory(plan: dict[str, int], parts: int = 1) -> float | None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    rules = Rules(folder="", max_model_len=1, dimensions=[1], plan=plan, parts=parts)
    Metrics(rules, Load(10, 100), registry)
    return registry.get_sample_value("qembed_memory_bytes")


def test_memory_is_per_device_as_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "resident", lambda _: 40)
    monkeypatch.setattr(machine, "cuda_used", lambda _: 100)
    assert memory(CPU) == 40
    assert memory(CPU, parts=2) == 20
    assert memory(GPU, parts=4) == 25
    monkeypatch.setattr(machine, "cuda_used", lambda _: None)
    monkeypatch.setattr(machine, "cuda_total_used", lambda: 30)  # a container sees the GPU, not its processes
    assert memory(GPU, parts=4) == 30


def test_memory_is_measured_once_for_many_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import CollectorRegistry

    measured: list[int] = []
    monkeypatch.setattr(machine, "resident", lambda leader: measured.append(leader) or 40)
    registry = CollectorRegistry()
    Metrics(Rules(folder="", max_model_len=1, dimensions=[1], plan=CPU), Load(10, 100), registry)
    assert {registry.get_sample_value("qembed_memory_bytes") for _ in range(100)} == {40}
    assert len(measured) < 10
