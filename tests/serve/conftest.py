"""The tiny checkpoints and the fake vLLM of tests/vllm."""

from __future__ import annotations

from tests.vllm.conftest import checkpoint, fake_vllm, int4, int8_table

__all__ = ["checkpoint", "fake_vllm", "int4", "int8_table"]
