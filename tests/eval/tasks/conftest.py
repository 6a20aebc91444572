"""Helpers for the tests of tasks."""

from __future__ import annotations

import numpy as np

from qembed.eval.tasks import Metric, Outcome


def metric_named(outcome: Outcome, name: str, group: str | None = None) -> Metric:
    (match,) = [metric for metric in outcome.metrics if metric.name == name and metric.group == group]
    return match


def circle(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)
