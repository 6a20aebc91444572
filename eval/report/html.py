"""A self-contained HTML page: no scripts, no network, light and dark, for screen and print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qembed.eval.report import parts, words
from qembed.report import plots


def page(result: Mapping[str, Any]) -> str:
    """The HTML page. Texts and names are escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    results = result["results"]
    overall, histogram = results["overall"], results["histogram"]
    baseline = result["settings"]["baseline"].upper()
    groups = [
        {"title": f"By {title}", "svg": plots.groups(_ordered(name, results[name]))}
        for name, title in words.GROUPS.items()
        if len(results[name]) > 1
    ]
    tasks = []
    for record in result["tasks"]:
        table = parts.task(record, baseline)
        tasks.append({"title": table.title, "columns": table.columns, "rows": table.rows, "notes": table.notes,
                      "svg": plots.differences(record["metrics"])})  # fmt: skip
    loader = ChoiceLoader([PackageLoader("qembed.eval.report", ""), PackageLoader("qembed.report", "")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    speed = parts.speed(result, baseline)
    return environment.get_template("page.html.j2").render(
        result=result,
        verdict=parts.verdict(result),
        numbers=parts.numbers(result),
        texts=words.data(result["data"]),
        counts=[*words.left_out(result["data"]), *words.counts(results["vectors"])],
        plots={
            "histogram": plots.histogram(
                histogram["edges"], histogram["counts"], {name: overall[name] for name in ("minimum", "p1", "p5", "mean")}
            ),
            "dimensions": plots.dimensions(results["by_dimension"]),
            "groups": groups,
        },
        tables={
            "dimension": parts.summaries("Cosine by dimension", "dimension", results["by_dimension"]),
            "neighbours": parts.neighbours(result),
            "gate": parts.gate(result),
            "worst": parts.worst(result),
            "speed": speed,
            "size": parts.size(result, baseline),
        },
        tasks=tasks,
        speed_notes=speed.notes if speed else [],
        settings=parts.settings(result),
    )


def _ordered(name: str, groups: Mapping[str, Any]) -> dict[str, Any]:
    """Languages in ascending order of their mean: there are many, and the lowest matter most."""
    if name != "by_language":
        return dict(groups)
    return dict(sorted(groups.items(), key=lambda item: item[1]["mean"] if item[1]["mean"] is not None else -2))
