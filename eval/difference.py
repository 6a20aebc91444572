"""Compares two results: the differences, and which of them are within noise.

A difference of two means is within noise if it is at most √(a² + b²), with a and b half the widths of their 95% intervals, as
for independent measurements. For the same texts that is conservative, because variation common to both is included. The
interval of a task's metric is that of its difference to the baseline, so these differences are compared. Without an interval
it is left open whether a difference is noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qembed.errors import BadInput
from qembed.eval.report import words

SUMMARIES = ("by_dimension", "by_kind", "by_language", "by_length")
PLAIN = ("median", "p5", "p1", "minimum")


@dataclass(frozen=True)
class Difference:
    """A number in both results. `within_noise` is None if it cannot be decided."""

    name: str
    first: float
    second: float
    noise: float | None

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference may be due to chance."""
        return None if self.noise is None else abs(self.difference) <= self.noise

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "difference": self.difference, "within_noise": self.within_noise}


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that both results have, and notes about other differences."""
    differences = [difference.record() for difference in _differences(first, second)]
    return {"notes": list(_notes(first, second)), "differences": differences}


def check(result: Mapping[str, Any], path: Path) -> None:
    """Check that a result is complete and well-formed, by comparing it with itself.

    Raises:
        BadInput: the result read from `path` is damaged.
    """
    try:
        compare(result, result)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{path}: not a whole result of `qembed eval` ({message})") from error


def noise(*intervals: Sequence[float] | None) -> float | None:
    """The threshold for a difference of two means: the root of the sum of squares of half the interval widths."""
    if any(interval is None for interval in intervals):
        return None
    return float(sum(((interval[1] - interval[0]) / 2) ** 2 for interval in intervals if interval is not None) ** 0.5)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    left, right = first["results"], second["results"]
    yield from _means("all texts", left["overall"], right["overall"])
    for key in PLAIN:
        if left["overall"][key] is not None and right["overall"][key] is not None:
            yield Difference(f"{key} cosine, all texts", left["overall"][key], right["overall"][key], None)
    for part in SUMMARIES:
        label = part.removeprefix("by_")
        for name in left[part]:
            if name in right[part]:
                yield from _means(f"{label} {name}", left[part][name], right[part][name])
    if left["neighbours"] and right["neighbours"]:
        for key, name in words.NEIGHBOURS.items():
            here, there = left["neighbours"][key], right["neighbours"][key]
            for depth in here["overlap"]:
                spread = noise(here["interval"][depth], there["interval"][depth])
                yield Difference(f"top {depth} kept, {name}", here["overlap"][depth], there["overlap"][depth], spread)
    yield from _tasks(first["tasks"], second["tasks"])


def _means(name: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[Difference]:
    if left["mean"] is not None and right["mean"] is not None:
        yield Difference(f"mean cosine, {name}", left["mean"], right["mean"], noise(left["interval"], right["interval"]))


def _tasks(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    metrics = {_key(task): {(earlier["name"], earlier["group"]): earlier for earlier in task["metrics"]} for task in first}
    for task in second:
        for metric in task["metrics"]:
            earlier = metrics.get(_key(task), {}).get((metric["name"], metric["group"]))
            if earlier is None or earlier["difference"] is None or metric["difference"] is None:
                continue
            group = f" {metric['group']}" if metric["group"] else ""
            name = f"{task['task']} ({task['data']['name']}): {metric['name']}{group}, INT4 − baseline"
            yield Difference(name, earlier["difference"], metric["difference"], noise(earlier["interval"], metric["interval"]))


def _key(task: Mapping[str, Any]) -> tuple[str, str, str | None]:
    return task["task"], task["data"]["name"], task["data"]["sha256"]


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    if first["data"]["sha256"] != second["data"]["sha256"]:
        yield f"not the same texts: {first['data']['file']} and {second['data']['file']}"
    elif first["data"]["texts"] != second["data"]["texts"]:
        yield f"not the same texts: {first['data']['texts']} and {second['data']['texts']} of {first['data']['file']}"
    for side in ("candidate", "baseline"):
        left, right = (words.side({**result[side], "from_cache": 0}) for result in (first, second))
        if left != right:
            yield f"{side}: {left}  ↔  {right}"
    changed = [
        f"{name} {version} ↔ {second['versions'].get(name)}"
        for name, version in first["versions"].items()
        if version != second["versions"].get(name)
    ]
    if changed:
        yield f"versions: {', '.join(changed)}"
    left_out = {_key(task) for task in first["tasks"]} ^ {_key(task) for task in second["tasks"]}
    if left_out:
        yield f"only in one of them, or on other data: {', '.join(sorted({f'{task} ({name})' for task, name, _ in left_out}))}"
