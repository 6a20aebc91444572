"""A fake engine, which computes a text's vector from its tokens in no time. All else is `qembed embed` itself.

`python -m tests.embed.fake_engine ARGUMENTS` runs `qembed ARGUMENTS` with it. QEMBED_TEST_DELAY: seconds per batch;
QEMBED_TEST_SPOOL: seconds between writes of finished batches; QEMBED_TEST_ROWS: rows of a window; QEMBED_TEST_PEAK: a file for
the process's peak memory in KiB; QEMBED_TEST_LOG: a file for the number of texts of each batch, one per line.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qembed.checkpoint.find import SAMPLE, find
from qembed.embed import job_options, spool, windows
from qembed.embed.engine import NOT_FINITE, EngineFailed, sorted_batches
from qembed.embed.job_options import Computing
from qembed.embed.spool import Result
from qembed.embed.windows import Item

DIMENSIONS = 16
LIMIT = 64
SPOILT = "not a number"
"""A text whose vector is NaN."""
CRASH, CRASH_TOGETHER, FAIL, BREAK = "crash", "crash in company", "fail", "break"
"""Texts that kill the process, kill it unless alone in their batch, raise an error, and raise one for all later batches too."""


def vector(tokens: Sequence[int], dimensions: int) -> np.ndarray[Any, Any]:
    """The fake vector of a text."""
    frequencies = np.arange(1, dimensions + 1, dtype=np.float64)[:, None]
    numbers = np.asarray(tokens, np.float64)[None, :] + 1
    sums = np.sin(frequencies * numbers).sum(axis=1) + np.cos(len(tokens) * frequencies[:, 0])
    return (sums / np.linalg.norm(sums)).astype(np.float32)


class FakeEngine:
    """In place of `engine.InProcess`."""

    in_process = True

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.broken = False
        self.delay = float(os.environ.get("QEMBED_TEST_DELAY", "0"))

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        return sorted_batches(items, 64, 512)

    def embed(self, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        for number, items in batches.items():
            self._fail([item.text for item in items])
            time.sleep(self.delay)
            vectors = np.stack([vector(item.tokens or (), self.dimensions) for item in items])
            spoilt_indices = [index for index, item in enumerate(items) if item.text.endswith(SPOILT)]
            yield number, (vectors, dict.fromkeys(spoilt_indices, NOT_FINITE))

    def _fail(self, texts: Sequence[str]) -> None:
        if log := os.environ.get("QEMBED_TEST_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{len(texts)}\n")
        if CRASH in texts or (CRASH_TOGETHER in texts and len(texts) > 1):
            os.kill(os.getpid(), signal.SIGKILL)
        self.broken = self.broken or BREAK in texts
        if self.broken or FAIL in texts:
            raise EngineFailed("vLLM failed: an error")


def computing(options: Mapping[str, Any], _: Callable[[str], None]) -> Computing:
    """In place of `job_options._in_process`."""
    dimensions = options["dimensions"] or DIMENSIONS
    return Computing(SAMPLE, find(SAMPLE), LIMIT, partial(opened, dimensions), {"model": SAMPLE}, dimensions)


@contextmanager
def opened(dimensions: int) -> Iterator[FakeEngine]:
    """In place of `engine.opened`. QEMBED_TEST_PIDS is a folder in which this process creates a file named by its id."""
    if pids := os.environ.get("QEMBED_TEST_PIDS"):
        (Path(pids) / str(os.getpid())).touch()
    yield FakeEngine(dimensions)


def install() -> None:
    """Replace the engine."""
    job_options._in_process = job_options._on_cluster = computing
    spool.WRITE_SECONDS = float(os.environ.get("QEMBED_TEST_SPOOL", spool.WRITE_SECONDS))
    windows.ROWS = int(os.environ.get("QEMBED_TEST_ROWS", windows.ROWS))


def main() -> None:
    """`qembed` with the fake engine."""
    from qembed.cli import group

    install()
    try:
        group.main(prog_name="qembed")
    finally:
        if peak := os.environ.get("QEMBED_TEST_PEAK"):
            Path(peak).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


if __name__ == "__main__":
    main()
