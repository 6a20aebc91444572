"""Thresholds: whether a result passes, and a line for each threshold that it misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Thresholds:
    """What a result must reach; None is no threshold. `max_task_drop` is a share: 0.005 for 0.5%."""

    min_cosine: float | None = None
    min_p1: float | None = None
    max_task_drop: float | None = None


def verdict(results: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> dict[str, Any]:
    """The `verdict` part of a result: `passed`, and `failures`, one line each.

    A result fails if a vector is unusable, if the mean or the 1st percentile of the cosines at full dimension is below its
    threshold, or if the main metric of a task drops by more than the given share of the baseline's.
    """
    failures = []
    for side, counts in results["vectors"].items():
        if counts["not_finite"]:
            failures.append(f"{counts['not_finite']} {side} vectors hold NaN or infinity")
        if counts["zero"]:
            failures.append(f"{counts['zero']} {side} vectors are zero")
    for task in tasks:
        failures += [
            f"{count} {side} vectors of {task['task']} ({task['data']['name']}) are zero, or hold NaN or infinity"
            for side, count in task.get("unusable", {}).items()
            if count
        ]
    for name, key, least in (("mean", "mean", thresholds.min_cosine), ("p1", "p1", thresholds.min_p1)):
        value = results["overall"][key]
        if least is not None and (value is None or value < least):
            shown = "undefined" if value is None else f"{value:.6f}"
            option = "--min-cosine" if key == "mean" else "--min-p1"
            failures.append(f"{name} cosine at dimension {results['dimension']} is {shown}, below {option} {least:g}")
    if thresholds.max_task_drop is not None:
        for task in tasks:
            failures.extend(_drops(task, thresholds.max_task_drop))
    return {"passed": not failures, "failures": failures}


def drop(metric: Mapping[str, Any]) -> float | None:
    """The drop from baseline to candidate as a share of the baseline's value; None if either is undefined.

    For a baseline of 0 or less it is the absolute difference.
    """
    baseline, candidate = metric["baseline"], metric["candidate"]
    if baseline is None or candidate is None:
        return None
    lost = float(baseline - candidate)
    return lost / float(baseline) if baseline > 0 else lost


def _drops(task: Mapping[str, Any], most: float) -> list[str]:
    lines = []
    for metric in task["metrics"]:
        if not metric["main"]:
            continue
        lost = drop(metric)
        what = f"{task['task']} ({task['data']['name']}): {metric['name']}"
        if lost is None:
            lines.append(f"{what} is undefined, so --max-task-drop {_percent(most)} is not met")
        elif lost > most:
            lines.append(
                f"{what} falls from {metric['baseline']:.4f} to {metric['candidate']:.4f}, by {lost:.3%},"
                f" more than --max-task-drop {_percent(most)}"
            )
    return lines


def _percent(share: float) -> str:
    return f"{share * 100:g}%"
