"""JSON as RFC 8259 has it: no NaN and no Infinity, which Python writes and no other parser reads."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

ESCAPED = "qembed.json"
"""An error handler for streams of JSON: characters that their encoding lacks become JSON's escapes, not question marks."""


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, Unicode as it is. NaN and infinity become null; what JSON has no form for (dates) becomes its text."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escaped)
