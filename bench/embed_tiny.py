"""`embed_tiny.py INPUT OUTPUT`: `qembed embed` with an engine that computes nothing; prints JSON with peak KiB."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from qembed.checkpoint.find import SAMPLE, find
from qembed.embed import inputs
from qembed.embed.engine import sorted_batches
from qembed.embed.job import Job
from qembed.embed.run import run
from qembed.embed.spool import Result
from qembed.embed.windows import Item, Texts

LIMIT = 512


class Tiny:
    """An engine whose vectors are 16 numbers computed from a text's tokens."""

    dimensions = 16
    in_process = True

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """The batches that vLLM gets on a CPU."""
        return sorted_batches(items, 128, 8192)

    def embed(self, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        """The vectors of one batch after another."""
        for number, items in batches.items():
            sums = np.array([[sum(item.tokens or ())] for item in items], np.float32)
            vectors = np.sin(sums * np.arange(1, self.dimensions + 1, dtype=np.float32))
            yield number, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True), {})


def main() -> None:
    """Run, and print."""
    source, output = sys.argv[1:]
    texts = Texts(find(SAMPLE).tokenizer(), LIMIT)
    job = Job(inputs.find(source, None, "lines"), Path(output), texts, lambda: nullcontext(Tiny()), force=True)
    start = time.monotonic()
    outcome = run(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"vectors": outcome.totals.vectors, "seconds": time.monotonic() - start, "peak": peak}))


if __name__ == "__main__":
    main()
