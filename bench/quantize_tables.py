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
    known = {row: found for row, found in numbers.items() if found}
    if not known:
        return
    body = {"quality": quality, "llm": llm, "speed": speed, "memory": memory}[name](known)
    notes = [f"- {row.note}" for row in known if row.note]
    used = {row.environment: found["versions"] for row, found in known.items()}
    said = "; ".join(", ".join(f"{package} {version}" for package, version in found.items()) for found in used.values())
    dates = sorted({found["date"] for found in known.values()})
    when = " … ".join(dict.fromkeys((dates[0], dates[-1])))
    head = f"## {TITLES[name]}\n\n`make bench-quantize` on {machine()}; {when}. {said}."
    replace_section(f"bench-quantize {name}", "\n\n".join([head, body, "\n".join(notes)]))


def summary(found: Mapping[str, Any]) -> str:
    """The numbers of one row in one line."""
    said = [
        f"{found['seconds']:.1f} s",
        f"peak {gigabytes(found['peak_bytes'])}",
        f"tensors {found['tensor_bytes'] / 1e6:.2f} MB",
    ]
    if found.get("layer_seconds"):
        said.insert(0, f"{found['layer_seconds']:.1f} s a layer")
    if "mean" in found:
        said.insert(0, f"(1 − cosine) × 1000: mean {1000 * found['mean']:.2f}, p99 {1000 * found['p99']:.2f}")
    if "kl" in found:
        centred = ", ".join(f"{name} {1000 * found[name]['centred']:.1f}" for name in PROMPTS)
        said.insert(0, f"(1 − centred cosine) × 1000: {centred}, KL {found['kl']:.3f}")
    return ", ".join(said)


def quality(known: Mapping[Row, dict[str, Any]]) -> str:
    """How far vectors move, tool by tool."""
    peer = next((found["mean"] for row, found in known.items() if row.name == "autoawq"), None)
    lines = [
        [
            title(row, found),
            f"{1000 * found['mean']:.2f}",
            f"{found['mean'] / peer:.2f}" if peer else "",
            f"{1000 * found['p99']:.2f}",
            f"{found['tensor_bytes'] / 1e6:.2f}",
            f"{found['seconds']:.0f}",
            gigabytes(found["peak_bytes"]),
        ]
        for row, found in known.items()
    ]
    texts = next(iter(known.values()))["texts"]
    columns = ["", "mean", "of AutoAWQ's", "p99", "tensors, MB", "seconds", "peak memory"]
    return (
        f"Mean and 99th percentile of (1 − cosine) × 1000 between the vectors of INT4 and of the original, over {texts} "
        "held-out texts, in float32. Groups of 128 but where another size is named; "
        f"{CALIBRATION_TEXTS} calibration texts, the same for all. Seconds and memory are those of the whole process.\n\n"
        f"{table(columns, lines)}"
    )


def llm(known: Mapping[Row, dict[str, Any]]) -> str:
    """What a language model loses, beside plain AWQ."""
    peer: dict[str, Any] = next((found for row, found in known.items() if row.name == "llm-awq"), {})

    def beside(value: float, digits: int, other: float | None) -> str:
        return f"{value:.{digits}f}" + (f" ({value / other:.2f})" if other else "")

    lines = []
    for row, found in known.items():
        line = [title(row, found)]
        line += [beside(1000 * found[name]["centred"], 1, 1000 * peer[name]["centred"] if peer else None) for name in PROMPTS]
        line += [f"{100 * found[name]['kept']:.1f}%" for name in PROMPTS]
        line += [beside(found["kl"], 3, peer.get("kl")), f"+{found['nll']:.3f}"]
        lines.append(line)
    texts = next(iter(known.values()))["texts"]
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


def speed(known: Mapping[Row, dict[str, Any]]) -> str:
    """How long real shapes take."""
    lines = [
        [
            title(row, found),
            f"{found['tokens']:,}",
            f"{found['layer_seconds']:.1f}" if found["layer_seconds"] else "",
            f"{found['seconds']:.0f}",
            gigabytes(found["peak_bytes"]),
        ]
        for row, found in known.items()
    ]
    text = table(["", "calibration tokens", "seconds a layer", "seconds in all", "peak memory"], lines)
    layers = {row.name: found["layer_seconds"] for row, found in known.items()}
    if (ours := layers.get("layer")) and (theirs := layers.get("layer-autoawq")):
        text += f"\n\nA layer takes AutoAWQ {theirs / ours:.0f} times as long, on the same tokens."
    return f"Random weights (bench/random_checkpoint.py), 151,669 tokens in the table, groups of 128.\n\n{text}"


def memory(known: Mapping[Row, dict[str, Any]]) -> str:
    """Whether memory grows with the number of layers."""
    lines = [
        [title(row, found), f"{found['tokens']:,}", f"{found['seconds']:.0f}", gigabytes(found["peak_bytes"])]
        for row, found in known.items()
    ]
    text = table(["", "calibration tokens", "seconds", "peak memory"], lines)
    peaks = {row.name: found["peak_bytes"] for row, found in known.items()}
    if {"8B-2", "8B-8"} <= peaks.keys():
        text += f"\n\n8 layers take {peaks['8B-8'] / peaks['8B-2']:.2f} times the memory of 2."
    return f"Random weights: hidden 4096, MLP 12288, 32 heads, 8 key-value heads, groups of 128.\n\n{text}"


def title(row: Row, found: Mapping[str, Any]) -> str:
    """What the table calls `row`."""
    return row.title.format(version=next(iter(found["versions"].values())))


def gigabytes(size: int) -> str:
    """Bytes as gigabytes of 10⁹."""
    return f"{size / 1e9:.2f} GB"
