"""Checks that what `qembed eval` writes (reports, a section of the model card) replaces nothing that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qembed import targets
from qembed.checkpoint import model_card
from qembed.checkpoint.find import find_int4
from qembed.errors import QembedError
from qembed.targets import Target

INPUTS = ("model", "baseline_model", "data", "vectors", "baseline_vectors", "classification", "sts", "rerank", "api_key_file")


def check(options: Mapping[str, Any]) -> None:
    """Check the files that the command's `options` name.

    Raises:
        BadInput: a report or the model card is an input, two of them are one file, or a report exists and --force is not given.
    """
    paths = [*(options[name] for name in INPUTS), *options["retrieval"]]
    inputs = [path for value in paths if value is not None for path in _paths(str(value))]
    reports = [Target(path, "--report") for path in options["report"]]
    targets.check_targets(reports, inputs, force=options["force"])
    if options["card"]:
        cards: list[Target] = []
        with suppress(QembedError):  # the command itself reports a missing model
            cards.append(Target(find_int4(options["model"]).folder / model_card.FILE, "--card"))
        files = [path for path in inputs if path.is_file()]  # the model card is inside an input, the model's folder
        targets.check_targets([*cards, *reports], files, force=True)


def _paths(value: str) -> list[Path]:
    """The files and folders that an option names as PATH or FILE:COLUMN; none if it names a model on the hub."""
    candidates = dict.fromkeys([value, value.partition(":")[0]])
    return [Path(name) for name in candidates if name and Path(name).exists()]
