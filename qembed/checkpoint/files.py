"""Reading a checkpoint's files, with damage reported as bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qembed.errors import BadInput


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file; damage is reported as BadInput. Framework "np" reads headers without importing torch."""
    from safetensors import SafetensorError, safe_open

    _require_file(path)
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        raise BadInput(f"{path}: damaged safetensors file: {error}") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        BadInput: it cannot be read, is not JSON, or is no object.
    """
    _require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: not JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object")
    return value


def _require_file(path: Path) -> None:
    """Raise BadInput if `path` exists and is a folder, or a pipe, whose reader would wait forever."""
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: cannot be read: not a file")
