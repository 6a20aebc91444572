"""Tests that need an NVIDIA GPU: the plan against `nvidia-smi`, and an 8-bit cache. They are skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qembed.vllm import machine
from tests.e2e.http import embed
from tests.e2e.launcher import Launched

pytestmark = pytest.mark.vllm
CARD = machine.target()


@pytest.mark.skipif(CARD.kind != "cuda", reason="skipped: no NVIDIA GPU here")
def test_memory_on_the_device_matches_the_plan(int4_server: Launched) -> None:
    embed(int4_server.url, input=["word " * 200] * 64)
    plan = int4_server.ready["plan"]
    rest = int4_server.ready["memory_bytes"] - plan["runtime"] - plan["graphs"]
    assert 0 < int4_server.ready["memory_bytes"] < 0.5 * (CARD.memory or 0)
    assert rest < 2 * sum(plan.values())


@pytest.mark.skipif(not CARD.has_fp8, reason="skipped: no GPU with 8-bit floats here")
def test_an_fp8_cache_gives_nearly_the_same_vectors(int4_checkpoint: Path, int4_server: Launched) -> None:
    texts = ["an audio player", "a library for reading PDF files", "music " * 100]
    with Launched("--int4", "--model", int4_checkpoint, "--port", 0, "--kv-cache-dtype", "fp8", "--json") as server:
        server.wait_ready()
        assert server.ready["kv_cache_bytes"] * 2 == int4_server.ready["kv_cache_bytes"]
        cosines = np.sum(
            np.asarray(embed(server.url, input=texts).vectors) * np.asarray(embed(int4_server.url, input=texts).vectors), axis=1
        )
    assert cosines.min() > 0.98
