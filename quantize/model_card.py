"""README.md of a quantized checkpoint, the model card: what it is, how close it is to its source, how to use it."""

from __future__ import annotations

import json
from importlib import metadata

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.embedder import Embedder
from qembed.checkpoint.files import read_bytes
from qembed.checkpoint.find import SAMPLE
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.checkpoint.model_card import section
from qembed.checkpoint.reranker import LABEL_HEAD, Reranker
from qembed.installation import version
from qembed.quantize import float16
from qembed.quantize.calibration import Calibration
from qembed.quantize.manifest import fidelity_record
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.text.display import counted, one_line
from qembed.text.prompts import DEFAULT_PROMPTS

SHARE_OF_AWQ_ERROR = {"for bare paragraphs": "0.37", "under PromptEOL": "0.61", "in KL divergence": "0.58"}
"""Error of the default method as a share of plain AWQ's; from bench/RESULTS.md, "Quality of INT4: a language model"."""


def model_card(source: Checkpoint, settings: QuantizationSettings, calibration: Calibration, report: Report, size: int) -> str:
    """The text of README.md; `size` is the size of all tensors in bytes."""
    base = f"base_model: {source.name}\nbase_model_relation: quantized\n" if "/" in source.name else ""
    note = (
        "\nThe source is qembed's embedded sample, which exists to try the tools. Do not use it in production.\n"
        if source.name == SAMPLE
        else ""
    )
    is_reranker = source.reranker is not None
    readers = "vLLM loads" if is_reranker else "vLLM and SGLang load"
    library, contents, loading = _format(settings, report, size, readers)
    pipeline, tag = ("text-ranking", "reranker") if is_reranker else ("feature-extraction", "embeddings")
    usage = _rerank(source) if is_reranker else f"{loading} {_prompts(source.embedder)}\n{_vector(source)}"
    kind = "pairs, in the template" if is_reranker else "texts"
    return f"""---
{_licence(source)}{base}library_name: {library}
pipeline_tag: {pipeline}
tags: [awq, int4, {tag}, qembed]
---

# {source.name.split("/")[-1]}, AWQ INT4

The linear layers of `{source.name}` in 4 bits (AWQ, GEMM layout, groups of {settings.group_size}, with zero points), {contents}
{note}
{section(_fidelity_section(report))}

## How to use it

```
qembed serve --model FOLDER
```

{usage}
{_float16(report)}
## How it was made

Method: {_method(settings)}.
Calibration: {calibration.tokens:,} tokens of {calibration.source} {kind}. Settings, seed and hashes are in `qembed.json`.
{_scaled(report)}{"" if is_reranker else _comparison_with_awq(settings)}"""


def _rerank(source: Checkpoint) -> str:
    """How to get scores."""
    assert source.reranker is not None
    form = (
        "`yes` and `no` are read from the rows of the token table or output head, which are not quantized"
        if source.reranker.form == "original"
        else f"a classifier with one label, whose row (`{LABEL_HEAD}`) is not quantized"
    )
    return (
        "then `POST /v1/rerank` with a `query` and `documents` as plain texts: the server puts the template around them.\n"
        f"A score is the probability of yes, from 0 to 1; {form}.\n"
        f"{_without_qembed(source.reranker)}\n"
        f"A pair has at most {source.reranker.trunk.context:,} tokens with the template, without which scores are near random."
    )


def _without_qembed(reranker: Reranker) -> str:
    """How vLLM alone serves it."""
    overrides = f" --hf-overrides '{json.dumps(reranker.overrides)}'" if reranker.overrides else ""
    return f"Or, with vLLM alone: `vllm serve FOLDER --runner pooling{overrides}`; clients then send the template themselves."


def _prompts(embedder: Embedder) -> str:
    """Which prompts texts take."""
    query = embedder.prompts.get("query", "")
    queries = "`Instruct: {task}\\nQuery:{query}`" if query == DEFAULT_PROMPTS["query"] else f"`{one_line(query)}{{query}}`"
    line = f"Queries take the form\n{queries}" if query else "Queries take no prompt"
    if embedder.default_prompt is None:
        return f"{line}; documents take no prompt."
    return f"{line}; other texts take the prompt\n`{embedder.default_prompt}` (default_prompt_name)."


def _vector(source: Checkpoint) -> str:
    """How a vector is made, and to which sizes it may be cut."""
    embedder, appended = source.embedder, source.appended_token
    state = "the hidden state of the last token" if embedder.pooling == "last" else "the mean of all tokens' hidden states"
    state += f" (the tokenizer appends `{appended}`)" if appended is not None else ""
    dense = f", through {counted(len(embedder.dense), 'dense layer')} (in float, as in the source)" if embedder.dense else ""
    length = "scaled to unit length" if embedder.normalized else "**not scaled to unit length**"
    trained = "" if embedder.is_matryoshka else "; the source does not say that its vectors were trained to be cut"
    attention = "" if embedder.is_causal else "\nAttention is bidirectional."
    return (
        f"A vector is {state}{dense}, {length}:\n{embedder.width} numbers, which may be cut to {embedder.dimensions}"
        f"{trained}. A text has at most {embedder.context:,} tokens.{attention}"
    )


def _fidelity_section(report: Report) -> str:
    """The fidelity that quantization measured; `qembed eval --card` replaces this section."""
    fidelity = fidelity_record(report)
    if report.scores:
        tau = "" if fidelity["kendall_tau"] is None else f"; Kendall's τ of a query's documents {fidelity['kendall_tau']:.4f}"
        return (
            f"Difference between INT4 and original scores, computed in float32 on {fidelity['texts']} held-out pairs:\n"
            f"mean {fidelity['mean_score_difference']:.4f}, maximum {fidelity['max_score_difference']:.4f}{tau}.\n"
            f"Cosine similarity between the states that scores are read from: mean {fidelity['mean_cosine']:.4f}."
        )
    return (
        f"Cosine similarity between INT4 and original vectors, computed in float32 on {fidelity['texts']} held-out texts:\n"
        f"mean {fidelity['mean_cosine']:.4f}, minimum {fidelity['min_cosine']:.4f}.\n"
        "`qembed eval --model FOLDER --baseline fp16 --card` replaces this section with a measurement through vLLM\n"
        "on more texts, by language and dimension."
    )


def _scaled(report: Report) -> str:
    """A sentence on what was scaled to keep within float16; empty if nothing was."""
    if not report.scaled:
        return ""
    return f"Divided by powers of two to keep within float16, which changes no vector: {', '.join(report.scaled)}.\n"


def _comparison_with_awq(settings: QuantizationSettings) -> str:
    """The method's error on a public model compared with plain AWQ; empty unless every step has its default setting."""
    default = QuantizationSettings()
    steps = ("engine", "scales", "clip", "rounding", "target", "inputs")
    if any(getattr(settings, step) != getattr(default, step) for step in steps):
        return ""
    shares = ", ".join(f"{share} {measure}" for measure, share in SHARE_OF_AWQ_ERROR.items())
    return (
        "\nError of this method on SmolLM2-135M in groups of 64, as a share of plain AWQ's (qembed's bench/RESULTS.md):\n"
        f"{shares}. Measured on 2026-11-27 with the built-in calibration texts.\n"
    )


def _float16(report: Report) -> str:
    """What cannot be computed in float16, as a paragraph; empty if everything can."""
    lines = float16.overflows(report)
    if not lines:
        return ""
    return (
        f"\n**Not in float16**, whose largest number is 65,504: on the calibration texts {'; '.join(lines)}.\n"
        "Compute it in bfloat16 or float32 (`--dtype bfloat16`); `qembed serve` refuses float16.\n"
    )


def _method(settings: QuantizationSettings) -> str:
    """The steps of the method, as a list in words."""
    steps = ["no AWQ scales" if settings.scales == "none" else "AWQ scales"]
    if settings.clip:
        steps.append("clipping")
    if settings.engine == "autoawq":
        return f"AutoAWQ library, version {metadata.version('autoawq')}: {', '.join([*steps, 'round-to-nearest'])}"
    steps.append("GPTQ rounding" if settings.rounding == QuantizationSettings().rounding else "round-to-nearest")
    if settings.target == "original":
        steps.append("each layer fitted to the original model's outputs, regularized by cross-validation")
    else:
        steps.append("each layer fitted to its own outputs")
    if settings.refine:
        steps.append(f"refined by gradient in {settings.refine} epochs")
    return ", ".join(steps)


def _format(settings: QuantizationSettings, report: Report, size: int, readers: str) -> tuple[str, str, str]:
    """The library that reads the format, what the checkpoint contains besides the linear layers, and how vLLM loads it.

    `readers` says which servers load it without qembed.
    """
    megabytes, written = f"{size / 1e6:,.1f} MB", f"Written by qembed {version()}"
    if settings.token_table != INT8:
        return (
            "transformers",
            f"everything\nelse in float16: {megabytes}. {written}; {readers} it without qembed installed.",
            "or, with vLLM alone: `vllm serve FOLDER --runner pooling`.",
        )
    return (
        "vllm",
        f"the token\ntable in INT8 (relative error {report.table_error:.2%}), everything else in float16: {megabytes}.\n"
        f"{written}.\n\n**It needs qembed's vLLM plugin**: install a wheel of qembed beside vLLM\n"
        "(`qembed` on PyPI is another project). Without it vLLM stops with\n"
        f"`Unknown quantization method: {QUANT_METHOD}`. SGLang and transformers cannot read it; `qembed quantize\n"
        "--token-table float16` writes a checkpoint that they can.",
        "or, in the same environment: `vllm serve FOLDER --runner pooling`.",
    )


def _licence(source: Checkpoint) -> str:
    """The licence line of the source's own model card, or nothing: a licence is never invented."""
    card = source.folder / "README.md"
    if source.name == SAMPLE:
        return "license: apache-2.0\n"
    if card.exists():
        for line in read_bytes(card, source.folder).decode(errors="replace").split("\n---", 1)[0].splitlines():
            if line.startswith("license:"):
                return line + "\n"
    return ""
