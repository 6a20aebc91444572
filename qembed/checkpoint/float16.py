"""Whether a checkpoint can be computed in float16, by a field of its manifest that `quantize` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qembed.text.display import one_line

FIELD = "float16"
"""The manifest's field."""
OVERFLOWS = "overflows"
"""The entry with what cannot be computed in float16: a list of texts, empty if everything can."""
LARGEST = 65504.0
SHOWN, LONGEST = 3, 200
"""Number of texts, and of characters of each, that a manifest is believed."""


def overflow(manifest: Mapping[str, Any]) -> str | None:
    """What comes near the end of float16's range or exceeds it, in words; None if `manifest` knows of nothing."""
    record = manifest.get(FIELD)
    lines = record.get(OVERFLOWS) if isinstance(record, dict) else None
    if not isinstance(lines, list):
        return None
    return "; ".join(one_line(line)[:LONGEST] for line in lines[:SHOWN] if isinstance(line, str)) or None
