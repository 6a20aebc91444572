"""Rotary position embeddings (Su et al. 2021): those of config.json that vLLM and transformers compute alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qembed.errors import BadInput

TYPES = ("default", "linear", "llama3", "yarn")
"""Others depend on the longest text of a batch (longrope), or on a limit that the two take differently (dynamic)."""
SECTIONS = ("rope_parameters", "rope_scaling")
PARTIAL = "partial_rotary_factor"


def check_rope(config: Mapping[str, Any], path: Path) -> None:
    """Check that the rotary settings in the `config` of the file `path` are supported.

    Raises:
        BadInput: they are of another type, only for a part of each head, or apart for each kind of layer.
    """
    sections = [(name, values) for name in SECTIONS if isinstance(values := config.get(name), dict)]
    for name, values in sections:
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in TYPES or any(isinstance(value, dict) for value in values.values()):
            shown = kind if kind not in TYPES else "one for each kind of layer"
            raise BadInput(f"{path}: {name}: {str(shown)[:60]!r} is not supported; supported are {', '.join(TYPES)}")
    for name, values in [("config", config), *sections]:
        if values.get(PARTIAL) not in (None, 1):
            raise BadInput(f"{path}: {name}: {PARTIAL} {str(values[PARTIAL])[:60]} is not supported; whole heads are rotated")
