"""The checkpoints and the stand-in for vLLM that the tests of qembed/vllm have."""

from __future__ import annotations

from tests.vllm.conftest import checkpoint, fake_vllm, int4, int8_table

__all__ = ["checkpoint", "fake_vllm", "int4", "int8_table"]
