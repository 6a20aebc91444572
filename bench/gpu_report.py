"""The sections of RESULTS.md that the pieces of gpu.py write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import results

TARGET = 1.6 * 2**30
"""Bytes that INT4 of the 0.6B may take on the device in all."""
TITLES = {
    "quantize": "Quantizing on a GPU",
    "serve": "Serving on a GPU",
    "fidelity": "Vectors on a GPU",
    "together": "Two models on a GPU within 4 GiB",
}
Numbers = Mapping[str, Any]


def section(piece: str, record: Numbers) -> str:
    """The section of a piece: heading, where it was measured, tables, and what is missing."""
    where = record["where"]
    measured = {name: numbers for name, numbers in record["steps"].items() if not {"error", "left_out"} & set(numbers)}
    left_out = {name: numbers["left_out"] for name, numbers in record["steps"].items() if "left_out" in numbers}
    failed = {name: numbers["error"] for name, numbers in record["steps"].items() if "error" in numbers}
    memory = f", {_gib(where['memory'])}, capability {where['capability']}, driver {where['driver']}" if where["memory"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    rehearsal = " A rehearsal on the sample, without a GPU: the numbers mean nothing." if where["rehearsal"] else ""
    parts = [
        f"## {TITLES[piece]} (`bench/gpu.sh run {piece}`)",
        f"{where['name']}{memory}; {record['date']}. {versions}.{rehearsal}",
    ]
    parts += TABLES[piece](measured)
    parts += [f"{name}: failed: {error.splitlines()[0] if error else ''}" for name, error in failed.items()]
    parts += [f"{name}: left out: {reason}" for name, reason in left_out.items()]
    return "\n\n".join(parts)


def quantize(steps: Numbers) -> list[str]:
    """Time and memory, and how far the integers agree."""
    rows = [
        [
            name if "layers" in name else f"{name}, {step['layers']} layers",
            f"{step['seconds']:.0f}",
            _gib(step["peak_bytes"]),
            _gib(step["device_peak_reserved"]),
        ]
        for name, step in steps.items()
        if "layers" in step
    ]
    parts = [results.table(("shape", "seconds", "peak memory", "peak on the device"), rows)] if rows else []
    if "integers" in steps:
        names = {"against_cpu": "the CPU's", "against_itself": "a second run on the device"}
        keys = ("integers", "scales", "integers_where_scales_agree", "layers")
        agreement = [[title, *(f"{100 * steps['integers'][name][key]:.3f}%" for key in keys)] for name, title in names.items()]
        heads = ("the sample, equal to", "integers", "scales and zero points", "integers where these agree", "whole layers")
        parts.append(results.table(heads, agreement))
        parts.append(
            "A GPU adds in another order than a CPU, so the last bits of Gram matrices differ, and of two grid points or "
            "integers with nearly the same error it may take the other."
        )
    return parts + _tests(steps)


def serve(steps: Numbers) -> list[str]:
    """Memory by line, then tokens per second."""
    alone = steps.get("context", {}).get("context")
    parts = [f"A CUDA context with torch and cuBLAS and nothing else takes {_gib(alone)}."] if alone else []
    servers = {name: step for name, step in steps.items() if "speeds" in step}
    if servers:
        heads = (
            "0.6B shape",
            "longest text",
            "planned",
            "used",
            "weights: planned",
            "seen",
            "graphs: planned",
            "seen",
            "dtype",
            "kernel",
        )
        parts.append(results.table(heads, [_memory_row(name, step) for name, step in servers.items()]))
    if (int4 := servers.get("int4")) is not None:
        verdict = "met" if 0 < int4["used"] <= TARGET else "missed"
        parts.append(f"Target for INT4, at most {_gib(TARGET)} in all: {verdict} ({_gib(int4['used'])}).")
    full = max((len(step["speeds"]) for step in servers.values()), default=0)
    complete = {name: step for name, step in servers.items() if len(step["speeds"]) == full}
    parts += [_speeds(complete)] if complete else []
    variants = {name: step for name, step in servers.items() if name not in complete}
    parts += [_variants(variants)] if variants else []
    if (flood := steps.get("flood")) is not None:
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(flood["statuses"].items()))
        parts.append(
            f"Flood of a queue of {flood['queue']} texts: {statuses}. After SIGKILL of the engine vectors came again in "
            f"{flood['restart_seconds']:.0f} s."
        )
    return parts + _tests(steps)


def fidelity(steps: Numbers) -> list[str]:
    """Cosines with the reference."""
    heads = (
        "the sample",
        "vLLM's dtype",
        "quantization",
        "keys and values",
        "kernel",
        "texts",
        "lowest cosine",
        "of the two longest",
        "mean 1 − cosine",
        "alone or in a batch, lowest",
    )
    rows = [
        [
            name,
            *(step["loaded"].get(key, "") for key in ("dtype", "quantization", "cache", "kernel")),
            str(step["texts"]),
            *(f"{step[key]:.5f}" for key in ("lowest", "lowest_of_the_longest")),
            f"{step['mean_distance']:.2e}",
            f"{step['alone_or_together']:.5f}",
        ]
        for name, step in steps.items()
    ]
    note = "Against transformers in float32 with the same weights, INT4 ones dequantized."
    return [note, results.table(heads, rows)] if rows else []


def together(steps: Numbers) -> list[str]:
    """Memory and speed of two servers on one device."""
    parts = []
    for step in steps.values():
        verdict = "within" if step["used"] <= step["limit"] else "beyond"
        pairs = step["pairs_per_second"]
        speeds = zip(step["alone"].items(), step["beside"].values(), strict=True)
        lines = [
            f"{_cell(name)}: {a['tokens_per_second']:,.0f} tokens/s alone, {b['tokens_per_second']:,.0f} beside"
            for (name, a), b in speeds
        ]
        parts.append(
            f"An embedder and a reranker in INT4, both in the 0.6B's shape (`serve` takes one model each): "
            f"planned {_gib(step['planned'])}, used {_gib(step['used'])}, {verdict} {_gib(step['limit'])}; texts of up to "
            f"{' and '.join(f'{length:,}' for length in step['context'])} tokens. {'; '.join(lines)}. "
            f"{pairs['alone']:,.0f} pairs/s alone, {pairs['beside']:,.0f} beside."
        )
    return parts


TABLES = {"quantize": quantize, "serve": serve, "fidelity": fidelity, "together": together}


def _memory_row(name: str, step: Numbers) -> list[str]:
    plan, log = step["plan"], step["log"]
    weights = sum(size for line, size in plan.items() if line in ("token_table", "linear", "other"))
    return [
        name,
        f"{step['context']:,}",
        _gib(step["planned"]),
        _gib(step["used"]),
        _gib(weights),
        _gib(log.get("weights")),
        _gib(plan.get("graphs")),
        _gib(log.get("graphs")),
        step["loaded"].get("dtype", ""),
        step["loaded"].get("kernel", ""),
    ]


def _speeds(servers: Numbers) -> str:
    """Tokens per second, and the median milliseconds of a request, by load."""
    heads = [f"{name} {unit}" for name in servers for unit in ("tokens/s", "p50 ms", "p99 ms")]
    rows = []
    for load in dict.fromkeys(load for step in servers.values() for load in step["speeds"]):
        cells = [_cell(load)]
        for step in servers.values():
            timing = step["speeds"].get(load)
            cells += [
                f"{timing['tokens_per_second']:,.0f}", f"{timing['p50'] * 1000:.1f}", f"{timing['p99'] * 1000:.1f}"
            ] if timing else ["", "", ""]  # fmt: skip
        rows.append(cells)
    return results.table(("texts", *heads), rows)


def _variants(servers: Numbers) -> str:
    """Tokens per second of servers that were measured with few loads: a row each."""
    loads = list(dict.fromkeys(load for step in servers.values() for load in step["speeds"]))
    rows = [
        [name, *(f"{step['speeds'][load]['tokens_per_second']:,.0f}" if load in step["speeds"] else "" for load in loads)]
        for name, step in servers.items()
    ]
    return results.table(("tokens/s", *map(_cell, loads)), rows)


def _cell(load: str) -> str:
    batch, length = load.split("x")
    return f"{batch} of {length} tokens"


def _tests(steps: Numbers) -> list[str]:
    counts = {name: count for name, count in steps.get("tests", {}).items() if name != "seconds_taken"}
    return [f"Tests: {', '.join(f'{count} {name}' for name, count in counts.items()) or 'none'}."] if "tests" in steps else []


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"
