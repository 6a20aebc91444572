"""README.md of a checkpoint, its model card on a hub: what it is, how near it is to its source, how to use it."""

from __future__ import annotations

from importlib.metadata import version

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import SAMPLE
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.checkpoint.model_card import section
from qembed.quantize import manifest
from qembed.quantize.calibration import Calibration
from qembed.quantize.settings import QuantizationSettings, Report

OF_AWQ = {"for bare paragraphs": "0.41", "under PromptEOL": "0.64", "in KL divergence": "0.61"}
"""From bench/RESULTS.md, "Quality of INT4: a language model"."""


def model_card(source: Checkpoint, settings: QuantizationSettings, calibration: Calibration, report: Report, size: int) -> str:
    """README.md of the checkpoint: what it is, how near it is to its source, how to use it."""
    base = f"base_model: {source.name}\nbase_model_relation: quantized\n" if "/" in source.name else ""
    licence = _licence(source)
    note = (
        "\nThe source is qembed's embedded sample, made to try the tools with. It is not for production.\n"
        if source.name == SAMPLE
        else ""
    )
    library, contents, loading = _format(settings, report, size)
    return f"""---
{licence}{base}library_name: {library}
pipeline_tag: feature-extraction
tags: [awq, int4, embeddings, qembed]
---

# {source.name.split("/")[-1]}, AWQ INT4

The linear layers of `{source.name}` in 4 bits (AWQ, GEMM layout, groups of {settings.group_size}, with zero points), {contents}
{note}
{section(_nearness(report))}

## How to use it

```
qembed serve --model FOLDER
```

{loading} Queries go in as `Instruct: {{task}}\\nQuery:{{query}}`, documents as
they are; vectors are those of the last token, of unit length.

## How it was made

{_method(settings)};
{calibration.tokens:,} tokens of {calibration.source} calibration texts. `qembed.json` has settings, seed and hashes.
{_elsewhere(settings)}"""


def _nearness(report: Report) -> str:
    """What quantization itself measured; `qembed eval --card` puts more in its place."""
    measured = manifest.fidelity(report)
    return (
        f"Cosine similarity between the INT4 and the original vectors, computed in float32, on {measured['texts']} texts that"
        f" quantization\ndid not see: mean {measured['mean_cosine']:.4f}, least {measured['min_cosine']:.4f}.\n"
        "`qembed eval --model FOLDER --baseline fp16 --card` measures it on more texts, through vLLM, by\n"
        "language and dimension, and writes what it finds here."
    )


def _elsewhere(settings: QuantizationSettings) -> str:
    """What the same method costs a model that everybody can try it on; nothing where parts of it are switched off."""
    default = QuantizationSettings()
    parts = ("engine", "scales", "clip", "rounding", "target", "inputs")
    if any(getattr(settings, part) != getattr(default, part) for part in parts):
        return ""
    shares = ", ".join(f"{share} {what}" for what, share in OF_AWQ.items())
    return (
        f"\nWhat this method leaves of plain AWQ's error on SmolLM2-135M, groups of 64 (qembed's bench/RESULTS.md): {shares}.\n"
    )


def _method(settings: QuantizationSettings) -> str:
    clipping = "clipping, " if settings.clip else ""
    if settings.engine == "autoawq":
        return f"By the AutoAWQ library, version {version('autoawq')}: AWQ scales, {clipping}nearest rounding"
    fitted = "the original model" if settings.target == "original" else "its own outputs"
    scales = "" if settings.scales == "awq" else " (none)"
    refined = f", refined {settings.refine} times" if settings.refine else ""
    held = ", as far as cross-validation allows" if settings.target == "original" else ""
    return f"AWQ scales{scales}, {clipping}{settings.rounding} rounding, each layer fitted to {fitted}{held}{refined}"


def _format(settings: QuantizationSettings, report: Report, size: int) -> tuple[str, str, str]:
    """For the model card: the library that reads the format, what it holds in how many bytes, and how vLLM loads it."""
    megabytes, written = f"{size / 1e6:,.1f} MB", f"Written by qembed {version('qembed')}"
    if settings.token_table != INT8:
        return (
            "transformers",
            f"everything\nelse in float16: {megabytes}. {written}; vLLM and SGLang read it with nothing else\ninstalled.",
            "or, with vLLM alone: `vllm serve FOLDER --runner pooling`.",
        )
    return (
        "vllm",
        f"the token\ntable in INT8 (relative error {report.table_error:.2%}), everything else in float16: {megabytes}.\n"
        f"{written}.\n\n**It needs qembed's vLLM plugin**: install qembed beside vLLM. Without it vLLM stops with\n"
        f"`Unknown quantization method: {QUANT_METHOD}`. SGLang and transformers cannot read it; `qembed quantize\n"
        "--token-table float16` writes what they can.",
        "or, in the same environment: `vllm serve FOLDER --runner pooling`.",
    )


def _licence(source: Checkpoint) -> str:
    """The licence line that the source's own card has, so that a licence is never invented."""
    card = source.folder / "README.md"
    if source.name == SAMPLE:
        return "license: apache-2.0\n"
    if card.exists():
        for line in card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0].splitlines():
            if line.startswith("license:"):
                return line + "\n"
    return ""
