"""`qembed eval`."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qembed import checkpoint as checkpoints
from qembed.errors import BadInput

if TYPE_CHECKING:
    from qembed.checkpoint import Checkpoint
    from qembed.eval.compare import Reader
    from qembed.eval.sources import Side


@click.command(short_help="Tell what INT4 costs against FP16.")
@click.option("--model", envvar="QEMBED_MODEL", show_envvar=True, metavar="MODEL",
              help="INT4 checkpoint: its folder, or the model that `qembed quantize` made it from in this directory.  "
                   f"[default: what it made of {checkpoints.DEFAULT_MODEL}]")  # fmt: skip
@click.option("--baseline", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True,
              help="fp16: the original checkpoint as published, computed in float16 on a GPU and in float32 on a CPU. "
                   "fp32: the same weights, computed in float32 everywhere.")  # fmt: skip
@click.option("--baseline-model", metavar="MODEL", help="Original checkpoint: hub id, folder, or 'sample'.  "
              "[default: what the INT4 checkpoint was made from]")  # fmt: skip
@click.option("--engine", type=click.Choice(["vllm", "transformers"]),
              help="What runs the INT4 side: vLLM, or transformers with the weights dequantized.  "
                   "[default: vllm where it is installed]")  # fmt: skip
@click.option("--url", metavar="URL", help="Running server of the INT4 side (OpenAI-compatible), instead of starting one.")
@click.option("--baseline-url", metavar="URL", help="Running server of the baseline, instead of transformers.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
              help="Texts: .txt with one a line, or .jsonl with one object a line: text, and if you like id, kind "
                   "(query, document, code), language, instruction.  [default: the built-in held-out texts]")  # fmt: skip
@click.option("--min-cosine", type=float, metavar="X",
              help="Exit with 1 if the mean cosine at full dimension is below X (−1 to 1).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on standard output.")
def command(
    model: str | None,
    baseline: str,
    baseline_model: str | None,
    engine: str | None,
    url: str | None,
    baseline_url: str | None,
    data: Path | None,
    min_cosine: float | None,
    as_json: bool,
) -> None:
    """Tell what INT4 costs against FP16: the cosine between both vectors of the same text.

    The INT4 checkpoint runs through vLLM, which is started for it, and the original through transformers. Queries go in with
    their prompt. Texts longer than the context are cut at the same place for both sides, and counted.

    \b
    qembed eval --baseline fp16                      the default model, made by `qembed quantize`
    qembed eval --model sample --min-cosine 0.95     as a gate
    qembed eval --url http://127.0.0.1:8000 --json   a server that runs already

    Exit codes: 0 done, 1 --min-cosine missed, a vector unusable or a server failed, 2 bad input, 3 a package is missing.
    """  # noqa: D301 - click wants the character \b
    import json

    from rich.console import Console

    from qembed.eval import compare, report, texts

    if min_cosine is not None and not (math.isfinite(min_cosine) and -1 <= min_cosine <= 1):
        raise BadInput(f"--min-cosine {min_cosine}: not within -1…1")
    if url and engine:
        raise BadInput("--engine says how to start the INT4 side; with --url it runs already: leave one out")
    if baseline_url and baseline_model:
        raise BadInput("--baseline-url names a running server; leave --baseline-model out")
    chosen = texts.read(data or texts.HELDOUT)
    candidate_side, baseline_side, reader = _sides(model, baseline, baseline_model, engine, url, baseline_url)
    progress = Console(stderr=True)
    settings = compare.Settings(baseline, min_cosine)
    found = compare.compare(candidate_side, baseline_side, reader, chosen, settings, progress)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2))
    else:
        report.print_tables(Console(), found)
    for line in found["verdict"]["failures"]:
        click.echo(f"qembed: {line}", err=True)
    if not found["verdict"]["passed"]:
        raise SystemExit(1)


def _sides(
    model: str | None, baseline: str, baseline_model: str | None, engine: str | None, url: str | None, baseline_url: str | None
) -> tuple[Side, Side, Reader]:
    """Both sides and the tokenizer, from the options; servers that run are asked, nothing is started."""
    from qembed.eval import sources
    from qembed.eval.compare import Reader
    from qembed.eval.texts import DEFAULT_PROMPTS

    @cache
    def int4() -> Checkpoint:
        return checkpoints.find_int4(model)

    known: Checkpoint | None = None
    if url:
        candidate_side = sources.server(url)
    else:
        known = int4()
        through_vllm = engine == "vllm" if engine else sources.has_vllm()
        candidate_side = sources.vllm(known) if through_vllm else sources.transformers(known)
    if baseline_url:
        baseline_side = sources.server(baseline_url)
    else:
        original = checkpoints.find(baseline_model or checkpoints.source_of(int4()))
        if original.is_int4:
            raise BadInput(f"{original.folder}: an INT4 checkpoint; the baseline is the original that it was made from")
        baseline_side = sources.transformers(original, exact=baseline == "fp32")
        known = known or original
    if known is None and _from_command_line("model"):
        known = int4()
    if known is None:
        return candidate_side, baseline_side, Reader(DEFAULT_PROMPTS, None)
    return candidate_side, baseline_side, Reader(known.prompts, known.tokenizer())


def _from_command_line(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE
