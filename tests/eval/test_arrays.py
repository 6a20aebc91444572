"""Memory is bounded for many texts: vectors are read in blocks, and large intermediate arrays are files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qembed import bootstrap
from qembed.eval import arrays, fidelity, neighbours, result
from qembed.text.texts import Text


@pytest.mark.slow
def test_memory_stays_below_the_size_of_one_sides_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, width = 20_000, 512
    size = count * width * 4
    monkeypatch.setattr(arrays, "MAPPED_BYTES", size // 8)
    monkeypatch.setattr(fidelity, "BLOCK_ROWS", 512)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", size // 8)
    monkeypatch.setattr(neighbours, "QUERIES", 50)
    monkeypatch.setattr(neighbours, "PAIRED", 100)
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    random = np.random.default_rng(0)
    sides = []
    for name in ("candidate", "baseline"):
        memory_map = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, (count, width))
        for start in range(0, count, 5000):
            memory_map[start : start + 5000] = random.normal(size=(5000, width))
        sides.append(memory_map)
    texts = [Text(str(row), str(row)) for row in range(count)]
    tracemalloc.start()
    try:
        results = result.results(texts, sides[0], sides[1])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert results["overall"]["count"] == count
    assert peak < size, f"{peak / size:.2f} of one side's vectors"
