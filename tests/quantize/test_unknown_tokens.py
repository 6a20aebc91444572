"""Tokens of the tokenizer without a row in the model's token table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qembed.checkpoint.description import Checkpoint

from .conftest import quantize


@pytest.mark.slow
def test_a_token_beyond_the_table_that_no_calibration_text_has_is_a_warning(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    source = make_checkpoint()
    path = source.folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 300, "content": "[CUST]", **flags})
    path.write_text(json.dumps(tokenizer))
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert "'[CUST]' (id " in result.stderr
    assert any("[CUST]" in warning for warning in json.loads(result.stdout)["warnings"])
