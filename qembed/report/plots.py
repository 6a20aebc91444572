"""Plots as inline SVG: pure functions of numbers. Colours come from the page's CSS; shapes and labels work without them.

A plot is WIDTH units wide and scales to its column, so that its text is about as large as the page's on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH = 360
LEFT, RIGHT = 44, 12
ROW = 20
LETTER = 6.1
LONGEST = 26


def histogram(edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float | None]) -> Markup:
    """Histogram of cosines, with a labelled line at each of `marks`."""
    if not counts:
        return Markup("")
    height, base, top = 190, 160, 54
    low, high = edges[0], edges[-1]
    most = max(counts)

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = []
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        tall = (base - top) * count / most
        if count:
            parts.append(
                _rect(
                    across(start) + 0.4,
                    base - tall,
                    across(end) - across(start) - 0.8,
                    tall,
                    f"{count} from {start:.4f} to {end:.4f}",
                )
            )
    parts.append(_axis(across, ticks(low, high), base, top))
    parts.append(_text(LEFT - 5, top + 4, str(most), "end") + _text(LEFT - 5, base, "0", "end"))
    for number, (name, value) in enumerate((name, value) for name, value in marks.items() if value is not None):
        x, y = across(value), 12 + 11 * (number % 4)
        anchor = "start" if x < WIDTH / 2 else "end"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{base}"/>')
        parts.append(_text(x + (3 if anchor == "start" else -3), y, f"{name} {value:.4f}", anchor, "strong"))
    return _svg(height, parts, "Histogram of the cosines of all texts")


def dimensions(summaries: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Mean (dot with interval), 5th percentile (triangle) and minimum (bar) by vector length."""
    shown = {name: summary for name, summary in summaries.items() if summary["mean"] is not None}
    if not shown:
        return Markup("")
    height, base, top = 190, 160, 24
    low = min(summary["minimum"] for summary in shown.values())
    low, high = _rounded_down(low), 1.0

    def up(value: float) -> float:
        return base - (value - low) / (high - low) * (base - top)

    step = (WIDTH - LEFT - RIGHT) / len(shown)
    places = [LEFT + step * (number + 0.5) for number in range(len(shown))]
    parts = []
    for tick in ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(_text(LEFT - 5, up(tick) + 3, _short(tick, low, high), "end"))
    points = " ".join(f"{x:.1f},{up(summary['mean']):.1f}" for x, summary in zip(places, shown.values(), strict=True))
    parts.append(f'<polyline class="line" points="{points}"/>')
    for x, (name, summary) in zip(places, shown.items(), strict=True):
        if summary["interval"]:
            start, end = (up(value) for value in summary["interval"])
            parts.append(_whisker(x, x, start, end))
        parts.append(_dot(x, up(summary["mean"]), f"{name}: mean {summary['mean']:.5f}"))
        parts.append(_triangle(x, up(summary["p5"]), f"{name}: p5 {summary['p5']:.5f}"))
        parts.append(_bar(x, up(summary["minimum"]), f"{name}: minimum {summary['minimum']:.5f}"))
        parts.append(_text(x, base + 14, name, "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, base + 27, "dimensions", "middle"))
    parts.append(_legend())
    return _svg(height, parts, "Cosine by dimension")


def groups(summaries: Mapping[str, Mapping[str, Any]]) -> Markup:
    """A row per group: mean (dot with interval), 5th percentile (triangle), minimum (bar)."""
    shown = {name: summary for name, summary in summaries.items() if summary["mean"] is not None}
    if not shown:
        return Markup("")
    names = {name: f"{_cut(name)} ({summary['count']})" for name, summary in shown.items()}
    left = _margin(names.values())
    top, base = 26, 26 + ROW * len(shown)
    low, high = _rounded_down(min(summary["minimum"] for summary in shown.values())), 1.0

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = [_axis(across, ticks(low, high), base, top, left)]
    for number, (name, summary) in enumerate(shown.items()):
        y = top + ROW * (number + 0.5)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(left - 5, y + 3, names[name], "end"))
        if summary["interval"]:
            start, end = (across(value) for value in summary["interval"])
            parts.append(_whisker(start, end, y, y))
        parts.append(_bar(across(summary["minimum"]), y, f"{name}: minimum {summary['minimum']:.5f}", upright=True))
        parts.append(_triangle(across(summary["p5"]), y, f"{name}: p5 {summary['p5']:.5f}"))
        parts.append(_dot(across(summary["mean"]), y, f"{name}: mean {summary['mean']:.5f}"))
    parts.append(_legend())
    return _svg(base + 24, parts, "Cosine by group")


def differences(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """A row per metric of a task: the difference (dot) with its interval, and a line at zero."""
    shown = [metric for metric in metrics if metric["difference"] is not None]
    if not shown:
        return Markup("")
    names = [_cut(f"{metric['name']} {metric['group']}" if metric["group"] else metric["name"]) for metric in shown]
    left = _margin(names)
    top, base = 8, 8 + ROW * len(shown)
    ends = [value for metric in shown for value in (metric["difference"], *(metric["interval"] or ()))]
    reach = max(0.005, *(abs(value) for value in ends)) * 1.08

    def across(value: float) -> float:
        return left + (value + reach) / (2 * reach) * (WIDTH - left - RIGHT)

    parts = [_axis(across, ticks(-reach, reach), base, top, left)]
    parts.append(f'<line class="mark" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="{top}" y2="{base}"/>')
    for number, (name, metric) in enumerate(zip(names, shown, strict=True)):
        y = top + ROW * (number + 0.5)
        parts.append(_text(left - 5, y + 3, name, "end", "strong" if metric["main"] else ""))
        if metric["interval"]:
            start, end = (across(value) for value in metric["interval"])
            parts.append(_whisker(start, end, y, y))
        parts.append(_dot(across(metric["difference"]), y, f"{name}: {metric['difference']:+.4f}"))
    return _svg(base + 24, parts, "Difference between INT4 and the baseline, with 95% intervals")


def recall(points: Sequence[Mapping[str, Any]], exact: float, name: str) -> Markup:
    """Recall against milliseconds per query (both from `points`, labelled by `width`), with a line at exact search.

    `name` is the parameter that varies from point to point.
    """
    if not points:
        return Markup("")
    height, base, top = 220, 184, 24
    times = [point["milliseconds"] for point in points] + [exact]
    first, last = math.log10(max(min(times), 1e-4)) - 0.08, math.log10(max(*times, 1e-4)) + 0.08
    low = _rounded_down(min(min(point["interval"] or [point["recall"]]) for point in points))
    low, high = max(low, 0.0), 1.0

    def across(value: float) -> float:
        return LEFT + (math.log10(max(value, 1e-4)) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return base - (value - low) / (high - low) * (base - top)

    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(_text(LEFT - 5, up(tick) + 3, _short(tick, low, high), "end"))
    for tick in (factor * 10.0**power for power in range(math.floor(first), math.ceil(last) + 1) for factor in (1, 2, 5)):
        if first <= math.log10(tick) <= last:
            parts.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{top}" y2="{base}"/>')
            parts.append(_text(across(tick), base + 13, f"{tick:g}", "middle"))
    parts.append(f'<line class="mark" x1="{across(exact):.1f}" x2="{across(exact):.1f}" y1="{top - 8}" y2="{base}"/>')
    anchor = "end" if across(exact) > WIDTH / 2 else "start"
    parts.append(_text(across(exact) + (3 if anchor == "start" else -3), top - 10, f"exact: {exact:.3g} ms", anchor, "strong"))
    places = [(across(point["milliseconds"]), up(point["recall"])) for point in points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), point in zip(places, points, strict=True):
        if point["interval"]:
            start, end = (up(value) for value in point["interval"])
            parts.append(_whisker(x, x, start, end))
        parts.append(_dot(x, y, f"{name} {point['width']}: recall {point['recall']:.4f}, {point['milliseconds']:.3g} ms"))
        parts.append(_text(x + 5, y + 11, str(point["width"]), "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, base + 27, "milliseconds a query, one at a time", "middle"))
    return _svg(height, parts, "Recall against exact search, by time")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw), raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _rounded_down(low: float) -> float:
    """A value slightly below `low`, so that nothing lies on the axis, and far enough below 1."""
    return min(low - 0.06 * (1 - low), 1 - 1e-6)


def _svg(height: float, parts: Sequence[str], title: str) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>')


def _cut(name: str) -> str:
    """A user's name, shortened to the available space."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _margin(names: Iterable[str]) -> float:
    """Space for the longest of `names`, which are right-aligned to the plot."""
    return 10 + LETTER * max(len(name) + 6 * any(ord(sign) > 0x2E7F for sign in name) for name in names)


def _axis(across: Any, values: Sequence[float], base: float, top: float, left: float = LEFT) -> str:
    lines = [f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    low, high = (values[0], values[-1]) if values else (0.0, 1.0)
    for value in values:
        x = across(value)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>')
        anchor = "end" if x > WIDTH - RIGHT - 10 else "middle"
        lines.append(_text(min(x, WIDTH - 2), base + 13, _short(value, low, high), anchor))
    return "".join(lines)


def _short(value: float, low: float, high: float) -> str:
    """As many digits as distinguish neighbouring ticks."""
    digits = min(6, max(0, 2 - math.floor(math.log10(max(high - low, 1e-6)))))
    shown = f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
    return (shown if shown not in ("-0", "") else "0").replace("-", "−")


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _whisker(left: float, right: float, top: float, bottom: float) -> str:
    return f'<line class="whisker" x1="{left:.1f}" x2="{right:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, title: str) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}"'
    return f'<rect class="bar" {place}><title>{escape(title)}</title></rect>'


def _dot(x: float, y: float, title: str) -> str:
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.4"><title>{escape(title)}</title></circle>'


def _triangle(x: float, y: float, title: str) -> str:
    points = f"{x:.1f},{y - 3.6:.1f} {x - 3.4:.1f},{y + 2.6:.1f} {x + 3.4:.1f},{y + 2.6:.1f}"
    return f'<polygon class="low" points="{points}"><title>{escape(title)}</title></polygon>'


def _bar(x: float, y: float, title: str, *, upright: bool = False) -> str:
    width, height = (2, 10) if upright else (10, 2)
    return (
        f'<rect class="least" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _legend() -> str:
    return (
        _dot(LEFT + 4, 9, "mean") + _text(LEFT + 11, 12, "mean, 95% interval", "start")
        + _triangle(LEFT + 122, 9, "p5") + _text(LEFT + 129, 12, "p5", "start")
        + _bar(LEFT + 160, 9, "minimum", upright=True) + _text(LEFT + 167, 12, "minimum", "start")
    )  # fmt: skip
