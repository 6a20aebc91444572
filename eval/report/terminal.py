"""The result as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qembed.eval.report import parts, words
from qembed.text.display import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = {"median": "median", "p5": "p5", "p1": "p1", "minimum": "min"}
TEXT = 12
"""Least width of a column of words."""


def print_tables(console: Console, report: dict[str, Any]) -> None:
    """Print the result: what ran, cosines by dimension, kind, language and length, neighbours, worst texts, tasks."""
    from rich.markup import escape

    results, data = report["results"], report["data"]
    for side in ("candidate", "baseline"):
        console.print(f"{side + ':':<11}{escape(words.side(report[side]))}", highlight=False, soft_wrap=True)
    console.print(f"texts:     {escape(words.data(data))}", highlight=False, soft_wrap=True)
    for line in (*words.left_out(data), *words.counts(results["vectors"])):
        console.print(f"           {line}", highlight=False, soft_wrap=True)
    console.print()
    _print_summaries(console, "Cosine by dimension", "dimension", results["by_dimension"])
    for name, title in words.GROUPS.items():
        if len(results[name]) > 1:
            groups = dict(sorted(results[name].items())) if name == "by_language" else results[name]
            label = title
            if name == "by_length":
                label = next(iter(groups)).split()[-1]
                groups = {key.removesuffix(f" {label}"): group for key, group in groups.items()}
            _print_summaries(console, f"Cosine by {title}", label, groups)
    if (near := parts.neighbours(report)) is not None:
        _print_part(console, near)
    table = _table("Lowest cosines")
    for name in ("id", "kind", "language"):
        table.add_column(name)
    table.add_column("cosine", justify="right")
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=36)
    for row in results["worst"]:
        beginning = one_line(row["text"])
        table.add_row(
            escape(one_line(row["id"])),
            row["kind"],
            escape(one_line(row["language"])),
            words.number(row["cosine"], 5),
            escape(beginning),
        )
    _print_table(console, table)
    if report["speed"]:
        _print_speed(console, report["speed"], report["settings"]["baseline"].upper())
    for task in report["tasks"]:
        _print_task(console, task, report["settings"]["baseline"])
    if (gate := parts.gate(report)) is not None:
        _print_part(console, gate)


def print_differences(console: Console, comparison: dict[str, Any], first: str, second: str) -> None:
    """Print two results side by side; differences beyond noise come first."""
    for note in comparison["notes"]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    titles = {False: "More than noise", None: "Without an interval", True: "Within noise"}
    for kind, title in titles.items():
        rows = [
            difference
            for difference in comparison["differences"]
            if difference["within_noise"] is kind and difference["difference"]
        ]
        same = sum(
            difference["within_noise"] is kind and not difference["difference"] for difference in comparison["differences"]
        )
        heading = f"{title}: {len(rows)}" + (f", and {same} the same" if same else "")
        if not rows:
            console.print(heading, highlight=False)
            continue
        table = _table(heading)
        table.add_column("number")
        for name in ("first", "second", "difference", "noise"):
            table.add_column(name, justify="right")
        for difference in rows:
            table.add_row(
                difference["name"],
                words.number(difference["first"], 5),
                words.number(difference["second"], 5),
                words.signed(difference["difference"], 5),
                words.number(difference["noise"], 5),
            )
        _print_table(console, table)
    console.print(f"first: {first}   second: {second}", highlight=False, soft_wrap=True, markup=False)


def _print_speed(console: Console, speed: dict[str, Any], baseline: str) -> None:
    table = _table("Speed: both sides answer the same requests in turn")
    names = (
        "texts",
        "tokens",
        "n",
        *(f"{side}\n{what}" for what in ("tok/s", "ms p50/p99") for side in (baseline, "INT4")),
        "ratio",
    )
    for name in names:
        table.add_column(name, justify="right")
    for shape in speed["shapes"]:
        sides = [shape[name] for name in ("baseline", "candidate")]
        table.add_row(
            *(str(shape[name]) for name in ("batch", "tokens", "requests")),
            *(f"{side['tokens_per_second']:,.0f}" for side in sides),
            *(words.latency(side) for side in sides),
            words.ratio(shape),
        )
    _print_table(console, table)
    for line in words.speed_notes(speed):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print()


def _print_summaries(console: Console, title: str, label: str, summaries: dict[str, dict[str, Any]]) -> None:
    from rich.markup import escape

    table = _table(title)
    table.add_column(label, justify="right" if label == "dimension" else "left")
    undefined = any(summary["undefined"] for summary in summaries.values())
    # To fit into 80 columns, the median is left out where texts are undefined; the other reports have it.
    shown = {key: name for key, name in SHOWN.items() if not (undefined and key == "median")}
    for name in ("texts", *(["undefined"] if undefined else []), "mean", "± 95%", *shown.values()):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        counts = [str(summary["count"]), *([str(summary["undefined"])] if undefined else [])]
        mean = [words.number(summary["mean"], 5), words.margin(summary["interval"], 5)]
        table.add_row(escape(name), *counts, *mean, *(words.number(summary[key], 5) for key in shown))
    _print_table(console, table)


def _print_part(console: Console, part: parts.Table) -> None:
    """Print a part of the report without its notes."""
    table = _table(part.title)
    for number, column in enumerate(part.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in part.rows:
        table.add_row(*row.cells)
    _print_table(console, table)


def _print_task(console: Console, task: dict[str, Any], baseline: str) -> None:
    from rich.markup import escape

    table = _table(escape(words.task(task)))
    grouped = any(metric["group"] for metric in task["metrics"])
    mixed = any(metric["mixed"] is not None for metric in task["metrics"])
    table.add_column("metric")
    for name in ["group"] if grouped else []:
        table.add_column(name)
    for name in (baseline.upper(), "INT4", "difference", "95% interval", *(["old index"] if mixed else [])):
        table.add_column(name, justify="right")
    for metric in task["metrics"]:
        table.add_row(
            escape(metric["name"]),
            *([escape(metric["group"] or "all")] if grouped else []),
            words.number(metric["baseline"]),
            words.number(metric["candidate"]),
            words.signed(metric["difference"]),
            words.interval(metric["interval"], 3),
            *([words.number(metric["mixed"])] if mixed else []),
        )
    _print_table(console, table)
    for note in task["notes"]:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print()


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )


def _print_table(console: Console, table: Table) -> None:
    """Print a table under its title, which may be wider than the table.

    Numbers are never cut: if there is no room for them and some of the text, lines are longer than the terminal.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console.print(table.title, style="bold", highlight=False, soft_wrap=True)
    table.title = None
    needed = 2 * len(table.columns) + 2  # the gaps between columns
    for column in table.columns:
        cells = [line for cell in (column.header, *column.cells) for line in str(cell).splitlines()]
        widest = max(map(cell_len, cells), default=0)
        if column.justify == "right":
            column.no_wrap = True
        needed += widest if column.justify == "right" else min(widest, TEXT)
    if needed <= console.width:
        console.print(table)
        return
    Console(file=console.file, width=needed, force_terminal=console.is_terminal, no_color=console.no_color).print(table)
