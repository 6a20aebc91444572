"""The tables of `make bench-quantize`, from the numbers of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from language_model import PROMPTS
from quantize_rows import CALIBRATION_TEXTS, LLM_FOLDER, Row
from results import machine, replace_section, table

Numbers = Mapping[Row, dict[str, Any] | None]

TITLES = {
    "quality": "Quality of INT4: the sample checkpoint",
    "llm": "Quality of INT4: a language model",
    "speed": "Speed of quantizing",
    "memory": "Memory of quantizing",
}


def publish(name: str, numbers: Numbers) -> None:
    """Write the table `name` into bench/RESULTS.md; rows without numbers are left out."""
    results = {row: result for row, result in numbers.items() if result}
    if not results:
        return
    body = {"quality": quality, "llm": llm, "speed": speed, "memory": memory}[name](results)
    notes = [f"- {row.note}" for row in results if row.note]
    by_environment = {row.environment: result["versions"] for row, result in results.items()}
    lists = (", ".join(f"{package} {version}" for package, version in used.items()) for used in by_environment.values())
    versions = "; ".join(lists)
    dates = sorted({result["date"] for result in results.values()})
    when = " … ".join(dict.fromkeys((dates[0], dates[-1])))
    head = f"## {TITLES[name]}\n\n`make bench-quantize` on {machine()}; {when}. {versions}."
    replace_section(f"bench-quantize {name}", "\n\n".join([head, body, "\n".join(notes)]))


def summary(result: Mapping[str, Any]) -> str:
    """The numbers of one row in one line."""
    parts = [
        f"{result['seconds']:.1f} s",
        f"peak {gigabytes(result['peak_bytes'])}",
        f"tensors {result['tensor_bytes'] / 1e6:.2f} MB",
    ]
    if result.get("layer_seconds"):
        parts.insert(0, f"{result['layer_seconds']:.1f} s a layer")
    if "mean" in result:
        parts.insert(0, f"(1 − cosine) × 1000: mean {1000 * result['mean']:.2f}, p99 {1000 * result['p99']:.2f}")
    if "kl" in result:
        centred = ", ".join(f"{name} {1000 * result[name]['centred']:.1f}" for name in PROMPTS)
        parts.insert(0, f"(1 − centred cosine) × 1000: {centred}, KL {result['kl']:.3f}")
    return ", ".join(parts)


def quality(results: Mapping[Row, dict[str, Any]]) -> str:
    """Loss of quality by tool."""
    peer = next((result["mean"] for row, result in results.items() if row.name == "autoawq"), None)
    lines = [
        [
            title(row, result),
            f"{1000 * result['mean']:.2f}",
            f"{result['mean'] / peer:.2f}" if peer else "",
            f"{1000 * result['p99']:.2f}",
            f"{result['tensor_bytes'] / 1e6:.2f}",
            f"{result['seconds']:.0f}",
            gigabytes(result["peak_bytes"]),
        ]
        for row, result in results.items()
    ]
    texts = next(iter(results.values()))["texts"]
    columns = ["", "mean", "of AutoAWQ's", "p99", "tensors, MB", "seconds", "peak memory"]
    return (
        f"Mean and 99th percentile of (1 − cosine) × 1000 between the vectors of INT4 and of the original, over {texts} "
        "held-out texts, in float32. Groups of 128 unless stated; "
        f"{CALIBRATION_TEXTS} calibration texts, the same for all. Seconds and memory are of the whole process.\n\n"
        f"{table(columns, lines)}"
    )


def llm(results: Mapping[Row, dict[str, Any]]) -> str:
    """Loss of a language model, compared with plain AWQ."""
    peer: dict[str, Any] = next((result for row, result in results.items() if row.name == "llm-awq"), {})

    def with_share(value: float, digits: int, other: float | None) -> str:
        return f"{value:.{digits}f}" + (f" ({value / other:.2f})" if other else "")

    lines = []
    for row, result in results.items():
        line = [title(row, result)]
        line += [
            with_share(1000 * result[name]["centred"], 1, 1000 * peer[name]["centred"] if peer else None) for name in PROMPTS
        ]
        line += [f"{100 * result[name]['kept']:.1f}%" for name in PROMPTS]
        line += [with_share(result["kl"], 3, peer.get("kl")), f"+{result['nll']:.3f}"]
        lines.append(line)
    texts = next(iter(results.values()))["texts"]
    columns = [
        "",
        *(f"{name}, centred" for name in PROMPTS),
        *(f"{name}, top 10 kept" for name in PROMPTS),
        "KL",
        "nll",
    ]
    return (
        f"`{LLM_FOLDER.resolve().name}` in groups of 64, calibrated on the texts that ship with qembed, measured on {texts} "
        "English paragraphs of XQuAD, bare and under a prompt that makes a language model embed (bench/language_model.py). "
        "Mean of (1 − cosine) × 1000 between last tokens' hidden states less their mean, in brackets as a share of AWQ's; the "
        "ten nearest neighbours that stay; KL divergence and growth of the negative log-likelihood of the next token.\n\n"
        f"{table(columns, lines)}"
    )


def speed(results: Mapping[Row, dict[str, Any]]) -> str:
    """Time for real shapes."""
    lines = [
        [
            title(row, result),
            f"{result['tokens']:,}",
            f"{result['layer_seconds']:.1f}" if result["layer_seconds"] else "",
            f"{result['seconds']:.0f}",
            gigabytes(result["peak_bytes"]),
        ]
        for row, result in results.items()
    ]
    text = table(["", "calibration tokens", "seconds a layer", "seconds in all", "peak memory"], lines)
    layers = {row.name: result["layer_seconds"] for row, result in results.items()}
    if (ours := layers.get("layer")) and (theirs := layers.get("layer-autoawq")):
        text += f"\n\nA layer takes AutoAWQ {theirs / ours:.0f} times as long, on the same tokens."
    return f"Random weights (bench/random_checkpoint.py), 151,669 tokens in the table, groups of 128.\n\n{text}"


def memory(results: Mapping[Row, dict[str, Any]]) -> str:
    """Peak memory by number of layers."""
    lines = [
        [title(row, result), f"{result['tokens']:,}", f"{result['seconds']:.0f}", gigabytes(result["peak_bytes"])]
        for row, result in results.items()
    ]
    text = table(["", "calibration tokens", "seconds", "peak memory"], lines)
    peaks = {row.name: result["peak_bytes"] for row, result in results.items()}
    if {"8B-2", "8B-8"} <= peaks.keys():
        text += f"\n\n8 layers take {peaks['8B-8'] / peaks['8B-2']:.2f} times the memory of 2."
    return f"Random weights: hidden 4096, MLP 12288, 32 heads, 8 key-value heads, groups of 128.\n\n{text}"


def title(row: Row, result: Mapping[str, Any]) -> str:
    """The title of `row` in the table."""
    return row.title.format(version=next(iter(result["versions"].values())))


def gigabytes(size: int) -> str:
    """Bytes as gigabytes of 10⁹."""
    return f"{size / 1e9:.2f} GB"
