"""Shell completion of models, without importing anything but the standard library: it runs at each press of Tab."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qembed.checkpoint.find import DEFAULT_MODEL, SAMPLE

CACHED = "models--"
"""Prefix of a model's folder in the hub's cache; the rest is its id, with -- for the slash."""


def model_names(incomplete: str) -> list[str]:
    """The models that begin with `incomplete`: checkpoints in a folder, the sample, and hub ids that are in the hub's cache."""
    names = {SAMPLE, DEFAULT_MODEL, *_cached_ids(), *_checkpoints(incomplete)}
    return sorted(name for name in names if name.startswith(incomplete))


def _checkpoints(incomplete: str) -> Iterator[str]:
    """The checkpoints in the folder that `incomplete` leads to, and folders that lead further, with a slash at the end."""
    start = incomplete.rpartition("/")[0] + "/" if "/" in incomplete else ""
    try:
        folders = [path for path in sorted(Path(start or ".").expanduser().iterdir()) if path.is_dir()]
    except OSError:
        return
    for folder in folders:
        if (folder / "config.json").is_file():
            yield start + folder.name
        elif start:
            yield f"{start}{folder.name}/"


def _cached_ids() -> Iterator[str]:
    """The hub ids of the models in the hub's cache."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    try:
        folders = [path.name for path in cache.iterdir() if path.name.startswith(CACHED)]
    except OSError:
        return
    for name in folders:
        yield name.removeprefix(CACHED).replace("--", "/")
