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


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write `found` in the format of `path`'s suffix, atomically.

    Raises:
        QembedError: it cannot be written.
    """
    text = strict_json.dumps(found, indent=2) + "\n" if path.suffix.lower() == ".json" else page(found)
    files.replace(path, text)


def page(found: Mapping[str, Any]) -> str:
    """The HTML page; names are escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from qembed import __version__

    loader = ChoiceLoader([PackageLoader("qembed.search", ""), PackageLoader("qembed.report", "")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    recall = found["recall"]
    setting = WIDTH.get(found["kind"], "")
    return environment.get_template("page.html.j2").render(
        index=Path(found["index"]).name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        qembed=__version__,
        numbers=_numbers(found),
        words=words(found),
        svg=plots.recall(recall["points"], recall["exact"], setting) if recall else "",
        columns=[setting, *(COLUMNS if recall else ())],
        rows=[
            {"cells": [str(point["width"]), *cells(point)], "main": point["width"] == recall["chosen"], "words": []}
            for point in (recall["points"] if recall else [])
        ],
        settings=[
            ("index", found["index"]), ("vectors", found["source"]), ("model", found["model"] or "not said"),
            ("kind", found["kind"]), *((name, str(value)) for name, value in found["settings"].items()),
            ("vectors of", f"{found['dimensions']} dimensions"), ("size", f"{found['bytes'] / 1e6:,.1f} MB"),
        ],
    )  # fmt: skip


COLUMNS = ("recall@10", "95% interval", "recall@1", "ms a query")


def cells(point: Mapping[str, Any]) -> list[str]:
    """The cells of a point, in the order of COLUMNS."""
    interval = "–".join(f"{value:.3f}" for value in point["interval"]) if point["interval"] else ""
    return [f"{point['recall']:.4f}", interval, f"{point['first']:.4f}", f"{point['milliseconds']:.3g}"]


def words(found: Mapping[str, Any]) -> str:
    """An explanation of the numbers."""
    recall = found["recall"]
    if recall is None:
        return "A flat index compares with every vector: its answers are exact."
    least = next(point for point in recall["points"] if point["width"] == recall["chosen"])
    reached = (
        f"the least that finds {recall['wanted']:.0%}"
        if least["recall"] >= recall["wanted"]
        else f"the widest tried; {recall['wanted']:.0%} is not reached"
    )
    setting = WIDTH[found["kind"]]
    return (
        f"{recall['queries']} queries ({recall['source']}): the share of the {recall['depth']} truly nearest found, and the "
        f"time of a query. qembed search takes {setting} {recall['chosen']} unless told otherwise: {reached}. "
        f"Comparing with every vector takes {recall['exact']:.3g} ms."
    )


def _numbers(found: Mapping[str, Any]) -> list[dict[str, str]]:
    recall = found["recall"]
    numbers = [{"name": "Vectors", "value": f"{found['rows']:,}", "note": f"{found['dimensions']} dimensions"}]
    if recall:
        point = next(one for one in recall["points"] if one["width"] == recall["chosen"])
        numbers += [
            {"name": "Recall@10", "value": f"{point['recall']:.3f}", "note": f"{WIDTH[found['kind']]} {point['width']}"},
            {"name": "Time a query", "value": f"{point['milliseconds']:.3g} ms", "note": f"exact: {recall['exact']:.3g} ms"},
        ]
    else:
        numbers.append({"name": "Recall", "value": "1", "note": "exact"})
    return [*numbers, {"name": "Size", "value": f"{found['bytes'] / 1e6:,.1f} MB", "note": found["kind"]}]
