"""A source whose hidden states overflow float16, served in float16 by the real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qembed.checkpoint.find import find
from tests.e2e.launcher import Launched
from tests.quantize.test_float16 import POWER, change

pytestmark = pytest.mark.vllm


def test_a_source_that_overflows_float16_is_refused_in_it_by_its_first_texts(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp.up_proj.weight"][192:256] *= POWER
        tensors["layers.1.mlp.down_proj.weight"][:, 192:256] /= POWER

    folder = change(find("sample").folder, tmp_path / "overflowing", edit)
    with Launched("--fp16", "--model", folder, "--port", 0, "--dtype", "float16") as server:
        assert server.process.wait(300) == 2
        line = server.err.splitlines()[-1]
    assert "65,504" in line
    assert "qembed quantize" in line
