"""A placeholder checkpoint and keys, for command lines that are only planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_placeholder
from tests.vllm.conftest import AWQ, CONFIG


@pytest.fixture
def int4(tmp_path: Path) -> Path:
    return write_placeholder(tmp_path / "tiny-AWQ-INT4", {**CONFIG, "quantization_config": AWQ}).folder


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("a-key-for-tests\n")
    file.chmod(0o600)
    return file
