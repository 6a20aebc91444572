"""`qembed embed` with the fake engine: in this process, or in a separate one that can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import SAMPLE, find
from qembed.cli import group
from qembed.embed import job_options

from .fake_engine import DIMENSIONS, computing, vector

Embed = Callable[..., Result]


@pytest.fixture
def embed(monkeypatch: pytest.MonkeyPatch) -> Embed:
    """`qembed embed` in this process."""
    monkeypatch.setattr(job_options, "_in_process", computing)
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer())

    def run(*arguments: object, input: str | bytes | None = None) -> Result:  # noqa: A002
        return CliRunner().invoke(group, ["embed", *map(str, arguments)], input=input)

    return run


def start(*arguments: object, **variables: object) -> subprocess.Popen[bytes]:
    """`qembed embed` in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.embed.fake_engine", "embed", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **{f"QEMBED_TEST_{name.upper()}": str(value) for name, value in variables.items()}},
    )


LOAD_TOKENIZER = Checkpoint.tokenizer


@cache
def tokenizer() -> Tokenizer:
    """The sample's tokenizer, loaded once."""
    return LOAD_TOKENIZER(find(SAMPLE))


def expected(text: str, dimensions: int = DIMENSIONS) -> np.ndarray[Any, Any]:
    """The fake engine's vector of a text, as the model reads it."""
    return vector(tokenizer().encode(text).ids, dimensions)


def rejects(path: Path) -> list[dict[str, Any]]:
    """The records of a rejects file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ids(path: Path) -> list[str]:
    """The ids beside the vectors in `path`."""
    return [json.loads(line)["id"] for line in path.with_name(path.stem + ".ids.jsonl").read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder`, including hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
