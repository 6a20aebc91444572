"""Helpers that run `qembed quantize` on tiny checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

from click.testing import CliRunner, Result

from qembed.cli import group


def quantize(*arguments: str | Path) -> Result:
    """Run `qembed quantize` on few, short texts."""
    fast = ["--group-size", "64", "--calibration-texts", "64", "--max-tokens", "48"]
    return CliRunner().invoke(group, ["quantize", *fast, *map(str, arguments)])


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(result: Result, *words: str) -> None:
    """Assert exit code 2 and a one-line message that contains `words`."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]
