"""Thresholds: whether a result passes, and a line for each threshold that it misses or that cannot be decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qembed.eval.noninferiority import TOO_FEW, WORSE, TaskVerdict, judge
from qembed.text.display import counted


@dataclass(frozen=True)
class Thresholds:
    """What a result must reach; None is no threshold. `max_task_drop` is a share: 0.005 for 0.5%."""

    min_cosine: float | None = None
    min_p1: float | None = None
    max_task_drop: float | None = None


def verdict(results: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> dict[str, Any]:
    """The `verdict` part of a result: `passed`, and a line for each of its `failures` and of what is `undecided`.

    A result fails if a vector is unusable, if the mean or the 1st percentile of the cosines at full dimension is below its
    threshold, or if the main metric of a task is worse than --max-task-drop allows (`noninferiority`). A task with too few
    texts to tell is undecided. Only a result without either has passed.
    """
    failures = [*_unusable(results, tasks), *_below(results, thresholds)]
    tasks_judged = judged(tasks, thresholds)
    failures += [_line(task, thresholds) for task in tasks_judged if task.verdict == WORSE]
    undecided = [_line(task, thresholds) for task in tasks_judged if task.verdict == TOO_FEW]
    return {"passed": not failures and not undecided, "failures": failures, "undecided": undecided}


def judged(tasks: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> list[TaskVerdict]:
    """The verdict on the main metric of each task; empty without --max-task-drop."""
    margin = thresholds.max_task_drop
    if margin is None:
        return []
    return [judge(task, metric, margin) for task in tasks for metric in task["metrics"] if metric["main"]]


def _unusable(results: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for side, counts in results["vectors"].items():
        if counts["not_finite"]:
            yield f"{counted(counts['not_finite'], f'{side} vector')} with NaN or infinity"
        if counts["zero"]:
            yield f"{counted(counts['zero'], f'{side} vector')} of zeros alone"
    for task in tasks:
        for side, count in task.get("unusable", {}).items():
            if count:
                what = f"{counted(count, f'{side} vector')} of {task['task']} ({task['data']['name']})"
                yield f"{what} with NaN or infinity, or of zeros alone"


def _below(results: Mapping[str, Any], thresholds: Thresholds) -> Iterator[str]:
    for name, key, least in (("mean", "mean", thresholds.min_cosine), ("p1", "p1", thresholds.min_p1)):
        value = results["overall"][key]
        if least is not None and (value is None or value < least):
            shown = "undefined" if value is None else f"{value:.6f}"
            option = "--min-cosine" if key == "mean" else "--min-p1"
            yield f"{name} cosine at dimension {results['dimension']} is {shown}, below {option} {least:g}"


def _line(task: TaskVerdict, thresholds: Thresholds) -> str:
    what, option = f"{task.task} ({task.data}): {task.metric}", f"--max-task-drop {(thresholds.max_task_drop or 0) * 100:g}%"
    if task.drop is None:
        return f"{what} is undefined, so {option} cannot be met"
    falls = f"{what} {'rises' if task.drop < 0 else 'falls'} by {abs(task.drop):.2%}"
    if task.interval is None:
        return f"{falls}, without an interval, so whether {option} is met cannot be told"
    interval = f"95% interval of the drop {task.interval[0]:.2%} to {task.interval[1]:.2%}"
    if task.verdict == WORSE:
        return f"{falls} ({interval}), more than {option}"
    enough = f"; about {task.texts_needed:,} would, if the drop stays the same" if task.texts_needed else ""
    return f"{falls} ({interval}): {counted(task.texts, 'text')} cannot tell whether {option} is met{enough}"
