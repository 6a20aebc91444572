"""The report of `qembed index`: JSON, or a self-contained HTML page with a plot of recall against time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qembed.errors import BadInput
from qembed.report import files, plots
from qembed.search.nearest import WIDTH
from qembed.text import strict_json

KINDS = (".html", ".json")


def check(path: Path) -> None:
    """Check that a report can be written to `path`.

    Raises:
        BadInput: unknown suffix, or the folder is missing.
    """
    if path.suffix.lower() not in KINDS:
        raise BadInput(f"--report {path}: name it {' or '.join(KINDS)}")
    files.check(path)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` (what `qembed index --json` prints) in the format of `path`'s suffix, atomically.

    Raises:
        QembedError: it cannot be written.
    """
    text = strict_json.dumps(result, indent=2) + "\n" if path.suffix.lower() == ".json" else page(result)
    files.replace(path, text)


def page(result: Mapping[str, Any]) -> str:
    """The HTML page; names are escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from qembed import __version__

    loader = ChoiceLoader([PackageLoader("qembed.search", ""), PackageLoader("qembed.report", "")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    recall = result["recall"]
    setting = WIDTH.get(result["kind"], "")
    return environment.get_template("page.html.j2").render(
        index=Path(result["index"]).name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        qembed=__version__,
        numbers=_numbers(result),
        words=words(result),
        svg=plots.recall(recall["points"], recall["exact"], setting) if recall else "",
        columns=[setting, *(COLUMNS if recall else ())],
        rows=[
            {"cells": [str(point["width"]), *cells(point)], "main": point["width"] == recall["chosen"], "words": []}
            for point in (recall["points"] if recall else [])
        ],
        settings=[
            ("index", result["index"]), ("vectors", result["source"]), ("model", result["model"] or "unknown"),
            ("kind", result["kind"]), *((name, str(value)) for name, value in result["settings"].items()),
            ("dimensions", f"{result['dimensions']}"), ("size", f"{result['bytes'] / 1e6:,.1f} MB"),
        ],
    )  # fmt: skip


COLUMNS = ("recall@10", "95% interval", "recall@1", "ms a query")


def cells(point: Mapping[str, Any]) -> list[str]:
    """The cells of a point, in the order of COLUMNS."""
    interval = "–".join(f"{value:.3f}" for value in point["interval"]) if point["interval"] else ""
    return [f"{point['recall']:.4f}", interval, f"{point['first']:.4f}", f"{point['milliseconds']:.3g}"]


def words(result: Mapping[str, Any]) -> str:
    """An explanation of the numbers."""
    recall = result["recall"]
    if recall is None:
        return "A flat index compares with every vector: its answers are exact."
    chosen = next(point for point in recall["points"] if point["width"] == recall["chosen"])
    reached = (
        f"the smallest that finds {recall['wanted']:.0%}"
        if chosen["recall"] >= recall["wanted"]
        else f"the largest measured; {recall['wanted']:.0%} is not reached"
    )
    setting = WIDTH[result["kind"]]
    return (
        f"{recall['queries']} queries ({recall['source']}): the share of the {recall['depth']} true nearest that is found, and "
        f"the time of a query. The default of qembed search is {setting} {recall['chosen']}, {reached}. "
        f"Comparing with every vector takes {recall['exact']:.3g} ms."
    )


def _numbers(result: Mapping[str, Any]) -> list[dict[str, str]]:
    recall = result["recall"]
    numbers = [{"name": "Vectors", "value": f"{result['rows']:,}", "note": f"{result['dimensions']} dimensions"}]
    if recall:
        point = next(point for point in recall["points"] if point["width"] == recall["chosen"])
        numbers += [
            {"name": "Recall@10", "value": f"{point['recall']:.3f}", "note": f"{WIDTH[result['kind']]} {point['width']}"},
            {"name": "Time a query", "value": f"{point['milliseconds']:.3g} ms", "note": f"exact: {recall['exact']:.3g} ms"},
        ]
    else:
        numbers.append({"name": "Recall", "value": "1", "note": "exact"})
    return [*numbers, {"name": "Size", "value": f"{result['bytes'] / 1e6:,.1f} MB", "note": result["kind"]}]
