"""The result as Markdown, for a pull request or a wiki."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qembed.eval.report import parts, words


def document(result: Mapping[str, Any]) -> str:
    """The same numbers as the HTML page, as Markdown tables."""
    results = result["results"]
    baseline = result["settings"]["baseline"].upper()
    verdict = parts.verdict(result)
    lines = [f"# What INT4 costs: {_safe(result['candidate']['model'])}", "", f"**{verdict['sign']} {verdict['title']}**", ""]
    lines += [f"- {_safe(line)}" for line in verdict["lines"]] + [""]
    lines += [f"- {number['name']}: **{number['value']}** ({number['note']})" for number in parts.numbers(result)] + [""]
    lines += [
        f"{_safe(line)}."
        for line in (words.data(result["data"]), *words.left_out(result["data"]), *words.counts(results["vectors"]))
    ] + [""]
    tables = [
        parts.summaries("Cosine by dimension", "dimension", results["by_dimension"]),
        *(
            parts.summaries(f"Cosine by {title}", title, results[name])
            for name, title in words.GROUPS.items()
            if len(results[name]) > 1
        ),
        parts.neighbours(result),
        parts.gate(result),
        *(parts.task(task, baseline) for task in result["tasks"]),
        parts.worst(result),
        parts.speed(result, baseline),
        parts.size(result, baseline),
    ]
    for table in tables:
        if table is not None:
            lines += [f"## {_safe(table.title)}", "", *rows(table), ""]
            lines += [f"{_safe(note)}." for note in table.notes] + ([""] if table.notes else [])
    lines += ["## Settings and versions", ""]
    lines += [f"- {name}: {_safe(value)}" for name, value in parts.settings(result)]
    return "\n".join(lines) + "\n"


def rows(table: parts.Table) -> list[str]:
    """The lines of a table."""
    cells_of = [[_safe(cell) for cell in row.cells] for row in table.rows]
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in ([_safe(column) for column in table.columns], rule, *cells_of)]


def _safe(words_: str) -> str:
    """Escape a user's text, so that it cannot end a cell or become a tag, link or image."""
    text = " ".join(words_.split())
    for sign in ("\\", "|", "<", ">", "[", "]", "`", "*", "_"):
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return text
