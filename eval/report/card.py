"""The fidelity section of a checkpoint's model card (`qembed.checkpoint.model_card`), from an evaluation result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qembed.checkpoint import model_card
from qembed.errors import QembedError
from qembed.eval.report import markdown, parts, words
from qembed.report import files


def body(result: Mapping[str, Any]) -> str:
    """The text of the section: cosines by dimension, neighbours, tasks, and what ran on each side."""
    results = result["results"]
    overall, neighbours = results["overall"], results["neighbours"]
    baseline = result["settings"]["baseline"].upper()
    mean = f"{words.number(overall['mean'])} (± {words.margin(overall['interval'])})"
    p5, p1, minimum = (words.number(overall[key]) for key in ("p5", "p1", "minimum"))
    lines = [
        f"Cosine similarity between the INT4 and the {baseline} vectors of {overall['count']} texts: mean {mean},"
        f" 5% below {p5}, 1% below {p1}, minimum {minimum}."
    ]
    if neighbours:
        share = neighbours["candidate"]["overlap"]["10"]
        lines.append(f"Of the ten nearest neighbours of a text {share:.1%} are the same.")
    tables = [parts.summaries("", "dimension", results["by_dimension"]), *(_task(task, baseline) for task in result["tasks"])]
    for table in tables:
        lines += ["", *([f"{table.title}:", ""] if table.title else []), *markdown.rows(table)]
    sides = f"{words.side(result['candidate'])}; against {words.side(result['baseline'])}"
    lines += ["", f"Measured by `qembed eval` {result['qembed']} on {result['created'][:10]}: {sides}."]
    return "\n".join(lines)


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the numbers of `result` into the model card in `folder`; the rest of the card is unchanged.

    Raises:
        QembedError: the card cannot be read or written.
    """
    path = folder / model_card.FILE
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise QembedError(f"{path}: cannot be read: {error}") from error
    files.replace(path, model_card.with_section(before, body(result)))
    return path


def _task(record: Mapping[str, Any], baseline: str) -> parts.Table:
    """The main metrics of a task."""
    table = parts.task({**record, "metrics": [metric for metric in record["metrics"] if metric["group"] is None]}, baseline)
    return parts.Table(table.title, table.columns, table.rows)
