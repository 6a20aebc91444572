"""Wording that all reports share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qembed.text.display import counted, one_line
from qembed.vllm.kernels import NAMES

WEIGHTS = {"awq-int4": "INT4 weights", "awq-int4, int8 token table": "INT4 weights, INT8 token table"}
GROUPS = {"by_kind": "kind", "by_language": "language", "by_length": "length"}
NEIGHBOURS = {"candidate": "candidate → candidate", "mixed": "candidate → baseline"}
UNKNOWN = "–"


def side(description: dict[str, Any]) -> str:
    """What ran on one side: model, weights, engine, place, dtype and kernel."""
    weights = WEIGHTS.get(description["weights"], f"{description['weights']} weights") if description["weights"] else None
    engine = f"{description['engine']} {description['version']}" if description.get("version") else description["engine"]
    where_it_ran = {"server": "a running server", "file": "stored vectors"}.get(description["engine"], f"through {engine}")
    if description["engine"] == "server" and description.get("version"):
        where_it_ran += f" (vLLM {description['version']})"
    verb = "stored in" if description["engine"] == "file" else "computed in"
    computed = f"{verb} {description['dtype']}" if description["dtype"] else "dtype not reported"
    kernel = f"by {NAMES.get(description['kernel'], description['kernel'])}" if description.get("kernel") else None
    where = (
        f"at {description['url']}" if description["url"] else f"on {description['device']}" if description["device"] else None
    )
    cached = description.get("from_cache")
    from_cache = f"{cached} of {cached + description['computed']} vectors from the cache" if cached else None
    return ", ".join(
        part for part in (description["model"], weights, where_it_ran, where, computed, kernel, from_cache) if part
    )


def data(record: dict[str, Any]) -> str:
    """Which texts were used."""
    shortened = f", {record['cut']} cut at {record['limit']} tokens" if record["cut"] else ""
    repeated = f", {record['duplicates']} of them repeated" if record["duplicates"] else ""
    return f"{record['texts']} from {record['file']}{shortened}{repeated}"


def left_out(record: dict[str, Any]) -> list[str]:
    """A line for each file of vectors that lacks texts, or has vectors of no text. Older results count neither."""
    lines = []
    for side_, count in record.get("without_vector", {}).items():
        if count:
            lines.append(f"left out: {counted(count, 'text')} without a vector in the {side_}'s file")
    for side_, count in record.get("unused_vectors", {}).items():
        if count:
            lines.append(f"left out: {counted(count, 'vector')} of the {side_}'s file that no text belongs to")
    return lines


def counts(vectors: dict[str, dict[str, int]]) -> list[str]:
    """A line per side that has unusable or repeated vectors."""
    names = {"not_finite": "with NaN or infinity", "zero": "zero", "duplicate": "the same as another text's"}
    lines = []
    for name, numbers in vectors.items():
        parts = [f"{numbers[key]} {what}" for key, what in names.items() if numbers[key]]
        if parts:
            lines.append(f"{name} vectors: {', '.join(parts)}")
    return lines


def task(record: Mapping[str, Any]) -> str:
    """The name of a task and its data."""
    sizes = [f"{value:,} {name}" for name, value in record["data"].items() if isinstance(value, int)]
    return one_line(f"{record['task']}: {record['data']['name']}") + (f" ({', '.join(sizes)})" if sizes else "")


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash for None."""
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(ends: Sequence[float] | None, digits: int = 4) -> str:
    """Both ends of the interval of a difference."""
    return UNKNOWN if ends is None else f"{signed(ends[0], digits)}…{signed(ends[1], digits)}"


def margin(ends: Sequence[float] | None, digits: int = 4) -> str:
    """Half the width of an interval."""
    return UNKNOWN if ends is None else f"{(ends[1] - ends[0]) / 2:.{digits}f}"


def margin_percent(ends: Sequence[float] | None) -> str:
    """Half the width of an interval of a share."""
    return UNKNOWN if ends is None else f"{(ends[1] - ends[0]) / 2:.2%}"


def percent(share: float | None) -> str:
    """A share, or a dash for None."""
    return UNKNOWN if share is None else f"{share:.2%}".replace("-", "−")


def percents(ends: Sequence[float] | None) -> str:
    """Both ends of the interval of a share."""
    return UNKNOWN if ends is None else f"{percent(ends[0])}…{percent(ends[1])}"


def megabytes(size: int | None) -> str:
    """A size in bytes."""
    return UNKNOWN if size is None else f"{size / 1e6:,.0f} MB"


def latency(side_: dict[str, Any]) -> str:
    """The median and the 99th percentile of a request's time, in milliseconds."""
    return f"{side_['p50'] * 1000:,.0f}/{side_['p99'] * 1000:,.0f}"


def ratio(shape: dict[str, Any]) -> str:
    """INT4 relative to the baseline in texts per second, with the range of 90% of the rounds."""
    return f"{shape['ratio']:.2f}× ({shape['low']:.2f}–{shape['high']:.2f})"


def speed_notes(speed: dict[str, Any]) -> list[str]:
    """What ran, its memory, and caveats about the speeds."""
    names = ("candidate", "baseline")
    ran = [f"{name}: {side({**speed[name], 'url': None})}, memory {megabytes(speed[name]['memory'])}" for name in names]
    return [*ran, *speed["notes"]]
