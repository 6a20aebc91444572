"""Wording that all reports share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qembed.text.display import one_line
from qembed.vllm.kernels import NAMES

WEIGHTS = {"awq-int4": "INT4 weights", "awq-int4, int8 token table": "INT4 weights, INT8 token table"}
GROUPS = {"by_kind": "kind", "by_language": "language", "by_length": "length"}
NEIGHBOURS = {"candidate": "candidate → candidate", "mixed": "candidate → baseline"}
UNKNOWN = "–"


def side(said: dict[str, Any]) -> str:
    """What ran on one side."""
    weights = WEIGHTS.get(said["weights"], f"{said['weights']} weights") if said["weights"] else None
    engine = f"{said['engine']} {said['version']}" if said.get("version") else said["engine"]
    how = {"server": "a running server", "file": "stored vectors"}.get(said["engine"], f"through {engine}")
    if said["engine"] == "server" and said.get("version"):
        how += f" (vLLM {said['version']})"
    stored = "stored in" if said["engine"] == "file" else "computed in"
    computed = f"{stored} {said['dtype']}" if said["dtype"] else "in a dtype that it does not tell"
    kernel = f"by {NAMES.get(said['kernel'], said['kernel'])}" if said.get("kernel") else None
    where = f"at {said['url']}" if said["url"] else f"on {said['device']}" if said["device"] else None
    cached = said.get("from_cache")
    kept = f"{cached} of {cached + said['computed']} vectors from the cache" if cached else None
    return ", ".join(part for part in (said["model"], weights, how, where, computed, kernel, kept) if part)


def data(said: dict[str, Any]) -> str:
    """Which texts were used."""
    shortened = f", {said['cut']} cut at {said['limit']} tokens" if said["cut"] else ""
    repeated = f", {said['duplicates']} of them twice" if said["duplicates"] else ""
    return f"{said['texts']} from {said['file']}{shortened}{repeated}"


def counts(vectors: dict[str, dict[str, int]]) -> list[str]:
    """A line per side that has unusable or repeated vectors."""
    names = {"not_finite": "with NaN or infinity", "zero": "zero", "duplicate": "the same as another text's"}
    lines = []
    for name, found in vectors.items():
        parts = [f"{found[key]} {what}" for key, what in names.items() if found[key]]
        if parts:
            lines.append(f"{name} vectors: {', '.join(parts)}")
    return lines


def task(said: Mapping[str, Any]) -> str:
    """The name of a task and its data."""
    sizes = [f"{value:,} {name}" for name, value in said["data"].items() if isinstance(value, int)]
    return one_line(f"{said['task']}: {said['data']['name']}") + (f" ({', '.join(sizes)})" if sizes else "")


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
