"""Benchmarks on machines where they cannot run, and their arithmetic."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_the_bench_says_that_it_was_skipped(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    run = [sys.executable, str(BENCH / "gpu.py"), "--results", str(results)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("bench-gpu: skipped: no NVIDIA GPU")
    assert "Nothing was measured" in results.read_text()
    measured = results.read_text().replace("Nothing was measured", "| memory on the device | planned |")
    results.write_text(measured)
    subprocess.run(run, capture_output=True, timeout=120, check=True)
    assert results.read_text() == measured


@pytest.mark.parametrize("tokens", [43, 512, 2000])
def test_texts_have_exactly_the_requested_number_of_tokens(gpu: ModuleType, tokens: int) -> None:
    from qembed.checkpoint.find import SAMPLE, find

    tokenizer = find(SAMPLE).tokenizer()
    text = gpu.text_of(tokens, lambda text: len(tokenizer.encode(text).ids))
    assert len(tokenizer.encode(text).ids) == tokens


def test_the_section_separates_the_context_and_reports_the_target(gpu: ModuleType) -> None:
    from qembed.vllm.devices import PRESETS

    speeds = {
        f"{length}x{batch}": {"tokens_per_second": 1234.0, "p50": 0.01, "p99": 0.02}
        for length in gpu.LENGTHS
        for batch in gpu.BATCHES
    }
    numbers = {"planned": 2**30, "at_start": 2**30, "used": int(1.5 * 2**30), "speeds": speeds}
    section = gpu.report(PRESETS["T4"], 77.0, 2**29, {"int4": numbers, "fp16": {**numbers, "used": 3 * 2**30}})
    assert "| INT4 | 1.00 GiB | 1.00 GiB | 1.50 GiB | 1.00 GiB |" in section
    assert "Target for INT4, at most 1.60 GiB in all: met (1.50 GiB)" in section
    assert "| 2000 tokens × 64 | 1,234 | 10.0 | 20.0 | 1,234 | 10.0 | 20.0 |" in section
