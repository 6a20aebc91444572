"""From what the user asked for to what is compared: sides, texts, cache. Servers that run are asked; nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click

from qembed import checkpoint as checkpoints
from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput
from qembed.eval import sources, stored, texts
from qembed.eval.cache import default_folder
from qembed.eval.compare import Reader
from qembed.eval.sources import Side
from qembed.eval.texts import DEFAULT_PROMPTS, Data, Text

Options = Mapping[str, Any]
CLASHES = (
    ("url", "engine", "--engine says how to start the INT4 side; with --url it runs already: leave one out"),
    ("url", "vectors", "--url and --vectors both name the INT4 side: leave one out"),
    ("vectors", "engine", "--vectors are computed already: leave --engine out"),
    ("baseline_url", "baseline_model", "--baseline-url names a running server; leave --baseline-model out"),
    ("baseline_url", "baseline_engine", "--baseline-url names a running server; leave --baseline-engine out"),
    ("baseline_url", "baseline_vectors", "--baseline-url and --baseline-vectors both name the baseline: leave one out"),
    ("baseline_vectors", "baseline_model", "--baseline-vectors are computed already; leave --baseline-model out"),
    ("baseline_vectors", "baseline_engine", "--baseline-vectors are computed already; leave --baseline-engine out"),
)


def check(options: Options) -> None:
    """Refuse options that contradict each other.

    Raises:
        BadInput: they do.
    """
    for one, other, line in CLASHES:
        if options[one] and options[other]:
            raise BadInput(line)


def data(options: Options) -> Data:
    """The texts: the user's, the built-in ones, or, where both sides are files of vectors, numbers in place of texts."""
    if options["data"] is None and options["vectors"] and options["baseline_vectors"]:
        rows = len(stored.read(options["vectors"]).vectors)
        path = Path(options["vectors"])
        return Data(path, texts.sha256(path), [Text(f"row {row}", f"row {row}") for row in range(1, rows + 1)])
    return texts.read(options["data"] or texts.HELDOUT)


def cache_folder(options: Options) -> Path | None:
    """The folder that keeps vectors, or None."""
    return None if options["no_cache"] else options["cache"] or default_folder()


def sides(options: Options) -> tuple[Side, Side, Reader]:
    """Candidate, baseline, and what texts are read with."""

    @cache
    def int4() -> Checkpoint:
        return checkpoints.find_int4(options["model"])

    known: Checkpoint | None = None
    if options["vectors"]:
        candidate = sources.vectors(stored.read(options["vectors"]))
    elif options["url"]:
        candidate = sources.server(options["url"])
    else:
        known = int4()
        through_vllm = options["engine"] == "vllm" if options["engine"] else sources.has_vllm()
        candidate = sources.vllm(known) if through_vllm else sources.transformers(known)
    if options["baseline_vectors"]:
        baseline = sources.vectors(stored.read(options["baseline_vectors"]))
    elif options["baseline_url"]:
        baseline = sources.server(options["baseline_url"])
    else:
        original = checkpoints.find(options["baseline_model"] or checkpoints.source_of(int4()))
        if original.is_int4:
            raise BadInput(f"{original.folder}: an INT4 checkpoint; the baseline is the original that it was made from")
        exact = options["baseline"] == "fp32"
        if options["baseline_engine"] == "vllm":
            baseline = sources.vllm(original, "float32" if exact else "original")
        else:
            baseline = sources.transformers(original, exact=exact)
        known = known or original
    if known is None and _from_command_line("model"):
        known = int4()
    if known is None:
        return candidate, baseline, Reader(DEFAULT_PROMPTS, None)
    return candidate, baseline, Reader(known.prompts, known.tokenizer())


def _from_command_line(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE
