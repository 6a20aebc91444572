"""Writes an evaluation report to a file; the suffix selects the format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qembed.report.files import replace


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report in the format of `path`'s suffix, atomically.

    Raises:
        QembedError: it cannot be written.
    """
    from qembed.eval.report import html, markdown

    kind = path.suffix.lower()
    if kind == ".json":
        content = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    else:
        content = html.page(result) if kind == ".html" else markdown.document(result)
    replace(path, content)
