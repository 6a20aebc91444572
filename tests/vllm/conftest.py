"""Tiny checkpoints, and a fake vLLM whose behaviour a test chooses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qembed.checkpoint.description import Checkpoint
from tests.checkpoints import write_placeholder

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "is_matryoshka": True,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_placeholder(tmp_path / "tiny", CONFIG)


@pytest.fixture
def int4(tmp_path: Path) -> Checkpoint:
    return write_placeholder(tmp_path / "tiny-AWQ-INT4", {**CONFIG, "quantization_config": AWQ})


@pytest.fixture
def int8_table(tmp_path: Path) -> Checkpoint:
    quantization = {**AWQ, "quant_method": "qembed_awq", "token_table": "int8"}
    return write_placeholder(tmp_path / "int8-AWQ-INT4", {**CONFIG, "quantization_config": quantization})


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake module `vllm`. Its server runs the returned file, which a test writes."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # tests of the plugin import the real one into this process
    monkeypatch.setattr("qembed.vllm.machine.device", lambda: "cpu")
    monkeypatch.setattr("qembed.vllm.machine.accepts_listener", lambda: False)
    return package / "api_server.py"
