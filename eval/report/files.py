"""Writing a report: the file's name says which."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qembed.errors import BadInput, QembedError

KINDS = (".html", ".json", ".md")


def check(path: Path) -> None:
    """See that a report can be written to `path`, before anything takes long.

    Raises:
        BadInput: its name tells no kind of report, there is no such folder, or nothing can be written there.
    """
    if path.suffix.lower() not in KINDS:
        raise BadInput(f"--report {path}: name it {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if path.is_dir():
        raise BadInput(f"--report {path}: a folder")
    if not path.parent.is_dir():
        raise BadInput(f"--report {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadInput(f"--report {path}: {path.parent} cannot be written: {error.strerror or error}") from error


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report that the name of `path` asks for; what was there before is replaced whole, or not at all.

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


def replace(path: Path, content: str) -> None:
    """Put `content` where `path` is, whole or not at all.

    Raises:
        QembedError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise QembedError(f"{path}: cannot be written: {error.strerror or error}") from error
