"""Whether a task's main metric falls by more than a margin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qembed.eval.noninferiority import judge
from qembed.eval.tasks.retrieval import paired
from qembed.eval.thresholds import Thresholds, judged, verdict

RESULTS: dict[str, Any] = {
    "dimension": 8,
    "overall": {"mean": 0.99, "p1": 0.98},
    "vectors": {side: {"not_finite": 0, "zero": 0} for side in ("candidate", "baseline")},
}


def record(baseline: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """A task whose main metric is the mean over texts."""
    metric = paired("accuracy", baseline, candidate, main=True)
    return {"task": "classification", "data": {"name": "set"}, "metrics": [metric.record()]}


def task_with_losses(count: int, lost: int) -> dict[str, Any]:
    """A task of `count` texts of which the baseline predicts all and the candidate all but `lost`."""
    baseline = np.ones(count)
    candidate = baseline.copy()
    candidate[:lost] = 0
    return record(baseline, candidate)


@pytest.mark.parametrize(
    ("count", "lost", "expected"),
    [
        (192, 0, "not worse"),
        (192, 1, "too few texts to tell"),  # a drop of 0.52% is over 0.5%, but the interval includes smaller drops
        (192, 20, "worse"),
        (20_000, 20, "not worse"),
        (20_000, 100, "too few texts to tell"),
        (20_000, 200, "worse"),
    ],
)
def test_the_interval_decides(count: int, lost: int, expected: str) -> None:
    (task,) = judged([task_with_losses(count, lost)], Thresholds(max_task_drop=0.005))
    assert task.verdict == expected
    assert task.drop == pytest.approx(lost / count)
    assert task.texts == count
    assert (task.texts_needed is None) == (expected != "too few texts to tell" or lost / count == 0.005)


def test_each_undecided_or_failed_task_is_a_line_and_none_passes() -> None:
    thresholds = Thresholds(max_task_drop=0.005)
    result = verdict(RESULTS, [task_with_losses(192, 0)], thresholds)
    assert result == {"passed": True, "failures": [], "undecided": []}
    few = verdict(RESULTS, [task_with_losses(192, 1)], thresholds)
    assert (few["passed"], few["failures"]) == (False, [])
    assert "192 texts cannot tell whether --max-task-drop 0.5% is met" in few["undecided"][0]
    worse = verdict(RESULTS, [task_with_losses(192, 1), task_with_losses(192, 20)], thresholds)
    assert (worse["passed"], len(worse["failures"]), len(worse["undecided"])) == (False, 1, 1)


@pytest.mark.parametrize("margin", [0.002, 0.01])
def test_the_number_of_texts_needed_is_enough_to_decide(margin: float) -> None:
    random = np.random.default_rng(4)
    baseline = np.clip(random.normal(0.7, 0.2, 150), 0, 1)
    changes = random.normal(0, 0.04, 150)
    candidate = baseline - 0.004 - (changes - changes.mean())
    (few,) = judged([record(baseline, candidate)], Thresholds(max_task_drop=margin))
    assert few.verdict == "too few texts to tell"
    assert few.texts_needed is not None
    assert few.drop is not None
    times = -(-few.texts_needed // 150)
    (repeated,) = judged([record(np.tile(baseline, times), np.tile(candidate, times))], Thresholds(max_task_drop=margin))
    assert repeated.verdict == ("not worse" if few.drop < margin else "worse")


def test_a_drop_of_zero_is_not_worse_with_a_margin_of_zero() -> None:
    (task,) = judged([task_with_losses(10, 0)], Thresholds(max_task_drop=0.0))
    assert task.verdict == "not worse"


def test_drops_are_relative_to_the_baseline_and_absolute_below_zero() -> None:
    metric = {"name": "Spearman", "baseline": 0.5, "candidate": 0.4, "interval": (-0.15, -0.06), "count": 9, "main": True}
    task = {"task": "sts", "data": {"name": "pairs"}}
    judgement = judge(task, metric, 0.1)
    assert (judgement.verdict, judgement.drop) == ("worse", pytest.approx(0.2))
    assert judgement.interval == pytest.approx((0.12, 0.3))
    negative = judge(task, {**metric, "baseline": -0.1, "candidate": -0.2}, 0.1)
    assert (negative.verdict, negative.drop) == ("too few texts to tell", pytest.approx(0.1))
    assert negative.texts_needed is None


def test_an_undefined_metric_is_a_loss_only_if_the_baseline_has_it() -> None:
    metric = {"name": "Spearman", "baseline": 0.5, "candidate": None, "interval": None, "count": 9, "main": True}
    task = {"task": "sts", "data": {"name": "pairs"}, "metrics": [metric]}
    assert judge(task, metric, 0.1).verdict == "worse"
    assert judge(task, {**metric, "baseline": None}, 0.1).verdict == "too few texts to tell"
    assert judge(task, {**metric, "candidate": 0.5}, 0.1).verdict == "too few texts to tell"
    assert "undefined" in verdict(RESULTS, [task], Thresholds(max_task_drop=0.1))["failures"][0]
