"""A result as tables and lines of text. The HTML page and the Markdown are made from these, so they carry the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qembed.eval.report import words
from qembed.text.display import one_line

SUMMARY = {"mean": "mean", "median": "median", "p5": "p5", "p1": "p1", "minimum": "min"}
SHA = 16


@dataclass(frozen=True)
class Row:
    """The cells of a row. `main` rows are highlighted; `words` are the indices of text cells."""

    cells: Sequence[str]
    main: bool = False
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Table:
    """A table with a title; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict: a word, a sign that does not depend on colour, and a line per threshold: missed, undecided or set."""
    settings, failures, undecided = result["settings"], result["verdict"]["failures"], result["verdict"]["undecided"]
    thresholds = [
        f"{name}: {_threshold(key, settings[key])}"
        for key, name in (
            ("min_cosine", "mean cosine at least"),
            ("min_p1", "cosine of the lowest 1% at least"),
            ("max_task_drop", "a task's main number falls by at most"),
        )
        if settings[key] is not None
    ]
    if failures:
        title = "a check failed" if len(failures) == 1 else f"{len(failures)} checks failed"
        return {"kind": "missed", "sign": "✘", "title": f"No: {title}",
                "lines": [one_line(line) for line in (*failures, *undecided)]}  # fmt: skip
    if undecided:
        return {"kind": "open", "sign": "?", "title": "Too few texts to tell", "lines": [one_line(line) for line in undecided]}
    if thresholds:
        return {"kind": "met", "sign": "✔", "title": "Yes: all thresholds are met", "lines": thresholds}
    return {"kind": "open", "sign": "○", "title": "No thresholds were set", "lines": []}


def numbers(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The key numbers, shown first."""
    overall, overlaps = result["results"]["overall"], result["results"]["neighbours"]
    entries = [
        _number("mean cosine", words.number(overall["mean"]), f"± {words.margin(overall['interval'])}"),
        _number("1% of texts below", words.number(overall["p1"]), f"lowest {words.number(overall['minimum'])}"),
    ]
    if overlaps:
        share = overlaps["candidate"]["overlap"]["10"]
        entries.append(_number("10 nearest kept", f"{share:.1%}", f"old index {overlaps['mixed']['overlap']['10']:.1%}"))
    for task in result["tasks"]:
        for metric in task["metrics"]:
            if metric["main"]:
                note = f"{words.number(metric['baseline'])} → {words.number(metric['candidate'])}"
                entries.append(_number(f"{task['task']}, {metric['name']}", words.signed(metric["difference"]), note))
    sizes = [result[side]["bytes"] for side in ("candidate", "baseline")]
    if all(sizes):
        entries.append(
            _number("size", f"{sizes[0] / sizes[1]:.0%}", f"{words.megabytes(sizes[0])} of {words.megabytes(sizes[1])}")
        )
    return entries


def summaries(title: str, label: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per group of cosines."""
    undefined = any(summary["undefined"] for summary in groups.values())
    columns = [label, "texts", *(["undefined"] if undefined else []), "mean", "± 95%", *list(SUMMARY.values())[1:]]
    rows = [
        Row(
            [
                name,
                str(summary["count"]),
                *([str(summary["undefined"])] if undefined else []),
                words.number(summary["mean"], 5),
                words.margin(summary["interval"], 5),
                *(words.number(summary[key], 5) for key in list(SUMMARY)[1:]),
            ]
        )
        for name, summary in groups.items()
    ]
    return Table(title, columns, rows)


def neighbours(result: Mapping[str, Any]) -> Table | None:
    """How many neighbours are kept, for both kinds of index."""
    comparison = result["results"]["neighbours"]
    if comparison is None:
        return None
    columns = ["queries → index", "top 1", "± 95%", "top 10", "± 95%", "ρ of similarities"]
    rows = []
    for key, name in words.NEIGHBOURS.items():
        entry = comparison[key]
        shares = [
            cell
            for depth in entry["overlap"]
            for cell in (f"{entry['overlap'][depth]:.2%}", words.margin_percent(entry["interval"][depth]))
        ]
        rows.append(Row([name, *shares, words.number(entry["spearman"], 5)]))
    queries, texts, paired = (comparison[name] for name in ("queries", "texts", "paired"))
    note = f"{queries} of {texts} texts are queries, searched among all; ρ is over all pairs of {paired} texts"
    return Table("Neighbours kept", columns, rows, [note])


def task(record: Mapping[str, Any], baseline: str) -> Table:
    """A row per metric of a task."""
    mixed = any(metric["mixed"] is not None for metric in record["metrics"])
    columns = ["metric", "group", "n", baseline, "INT4", "difference", "95% interval", *(["old index"] if mixed else [])]
    rows = [
        Row(
            [
                metric["name"],
                metric["group"] or "all",
                str(metric["count"] or words.UNKNOWN),
                words.number(metric["baseline"]),
                words.number(metric["candidate"]),
                words.signed(metric["difference"]),
                words.interval(metric["interval"]),
                *([words.number(metric["mixed"])] if mixed else []),
            ],
            main=metric["main"],
        )
        for metric in record["metrics"]
    ]
    return Table(words.task(record), columns, rows, record["notes"])


def gate(result: Mapping[str, Any]) -> Table | None:
    """The verdict on each task, if there is a threshold for them."""
    if not result["gate"]:
        return None
    columns = ["task", "verdict", "drop", "95% interval", "texts", "texts needed"]
    rows = [
        Row(
            [
                one_line(f"{task['task']} ({task['data']}), {task['metric']}"),
                task["verdict"],
                words.percent(task["drop"]),
                words.percents(task["interval"]),
                f"{task['texts']:,}",
                words.UNKNOWN if task["texts_needed"] is None else f"{task['texts_needed']:,}",
            ],
            words=[1],
        )
        for task in result["gate"]
    ]
    most = _threshold("max_task_drop", result["settings"]["max_task_drop"])
    note = (
        f"worse: the interval of the drop lies beyond {most}; not worse: within it; otherwise there are too few texts to tell"
    )
    return Table("Drop of the tasks", columns, rows, [note])


def worst(result: Mapping[str, Any]) -> Table:
    """The texts with the lowest cosines."""
    rows = [
        Row(
            [
                one_line(row["id"]),
                row["kind"],
                one_line(row["language"]),
                words.number(row["cosine"], 5),
                one_line(row["text"]),
            ],
            words=[4],
        )
        for row in result["results"]["worst"]
    ]
    return Table("Texts with the lowest cosines", ["text", "kind", "language", "cosine", "begins"], rows)


def speed(result: Mapping[str, Any], baseline: str) -> Table | None:
    """A row per batch size and length."""
    measured = result["speed"]
    if measured is None:
        return None
    columns = [
        "request",
        "rounds",
        *(f"{name} {what}" for what in ("texts/s", "tokens/s", "p50/p99 ms") for name in (baseline, "INT4")),
    ]
    rows = []
    for shape in measured["shapes"]:
        sides = [shape[name] for name in ("baseline", "candidate")]
        rows.append(
            Row(
                [
                    f"{shape['batch']} × {shape['tokens']} tokens",
                    str(shape["requests"]),
                    *(f"{side['texts_per_second']:,.1f}" for side in sides),
                    *(f"{side['tokens_per_second']:,.0f}" for side in sides),
                    *(words.latency(side) for side in sides),
                    words.ratio(shape),
                ]
            )
        )
    return Table("Speed", [*columns, "ratio"], rows, words.speed_notes(measured))


def size(result: Mapping[str, Any], baseline: str) -> Table:
    """Bytes on disk, and in memory where measured."""
    rows = []
    for name, key in ((baseline, "baseline"), ("INT4", "candidate")):
        used = result["speed"][key]["memory"] if result["speed"] else None
        rows.append(Row([name, words.megabytes(result[key]["bytes"]), words.megabytes(used)]))
    notes = [] if result["speed"] else ["memory in use is measured with --task speed"]
    return Table("Memory and size", ["side", "tensors on disk", "memory in use"], rows, notes)


def settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Software, models, machine and versions of both sides."""
    machine, data = result["machine"], result["data"]
    where = f"{machine['architecture']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    entries = [
        ("candidate", words.side(result["candidate"])),
        ("baseline", words.side(result["baseline"])),
        ("texts", f"{words.data(data)} (SHA-256 {data['sha256'][:SHA]}…)"),
        ("machine", where),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)),
        ("intervals", f"{result['settings']['interval']:.0%}, bootstrap of {result['settings']['resamples']} draws"),
        ("percentiles", f"{result['settings']['percentiles']} interpolation"),
    ]
    for record in result["tasks"]:
        chosen = ", ".join(f"{name}: {_plain(value)}" for name, value in record["settings"].items() if value is not None)
        if chosen:
            entries.append((record["task"], chosen))
    return entries


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


def _number(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _threshold(key: str, value: float) -> str:
    return f"{value * 100:g}%" if key == "max_task_drop" else f"{value:g}"
