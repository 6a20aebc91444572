"""Deviations of measured memory from the plan."""

from __future__ import annotations

from qembed.vllm import plan_table
from qembed.vllm.plan import Plan

MIB = 2**20
PLAN = Plan(300 * MIB, 240 * MIB, 0, 500 * MIB, 1, activations=60 * MIB, graphs=100 * MIB, runtime=500 * MIB)


def test_a_deviation_below_15_percent_is_no_warning() -> None:
    assert plan_table.deviation(PLAN, {"total": int(PLAN.total * 1.149)}) is None
    assert plan_table.deviation(PLAN, {"total": int(PLAN.total * 0.851)}) is None


def test_an_idle_server_may_lack_the_activations() -> None:
    large = Plan(300 * MIB, 0, 0, 0, 1, activations=1000 * MIB, runtime=500 * MIB)
    assert plan_table.deviation(large, {"total": 800 * MIB}, idle=True) is None
    assert plan_table.deviation(large, {"total": 800 * MIB}) is not None
    assert plan_table.deviation(large, {"total": 600 * MIB}, idle=True) is not None


def test_the_line_that_deviates_most_is_named() -> None:
    total = PLAN.total + 400 * MIB
    weights = plan_table.deviation(PLAN, {"total": total, "weights": (540 + 380) * MIB, "graphs": 100 * MIB})
    assert weights is not None
    assert weights.startswith(
        "memory is 2.1 GiB, 24% more than the planned 1.7 GiB; most of it in: weights (planned 540 MiB, meas"
    )
    graphs = plan_table.deviation(PLAN, {"total": total, "weights": 540 * MIB, "graphs": 500 * MIB})
    assert graphs is not None
    assert "most of it in: CUDA graphs (planned 100 MiB, measured about 500 MiB)" in graphs


def test_an_unexplained_deviation_is_attributed_to_the_processes() -> None:
    warning = plan_table.deviation(PLAN, {"total": PLAN.total - 400 * MIB})
    assert warning is not None
    assert "24% less" in warning
    assert "most of it in: context, processes and libraries (planned 500 MiB, measured about 100 MiB)" in warning
