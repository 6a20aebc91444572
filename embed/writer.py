"""Embeds windows, separates rejects, and writes in the background."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from qembed.embed import formats, outputs
from qembed.embed.engine import Engine
from qembed.embed.job import Job
from qembed.embed.journal import Journal, Totals
from qembed.embed.outputs import REJECTS, Output, VectorBlock, VectorLayout
from qembed.embed.rows import Reject
from qembed.embed.spool import Result, Spool
from qembed.embed.suspects import Suspects
from qembed.embed.windows import Window
from qembed.errors import BadInput
from qembed.files import sync
from qembed.vectors import dtypes

OnBatch = Callable[[int, int, bool], None]
"""Called with the tokens and rows of a batch, and whether this run computed it."""
Unfit = Callable[[VectorBlock], Mapping[int, str]]


@dataclass(frozen=True)
class Progress:
    """Progress: total counts, share of the input (0 to 1), and the speed of this run without what earlier runs computed."""

    totals: Totals
    fraction: float
    rows_per_second: float
    tokens_per_second: float


OnProgress = Callable[[Progress], None]


def compute(window: Window, engine: Engine, spool: Spool | None, suspects: Suspects, on_batch: OnBatch) -> Result:
    """The vectors of a window in row order; `spool` keeps finished batches."""
    import numpy as np

    places = engine.batches(window.items)
    finished = spool.begin(window.number) if spool else {}
    vectors = np.zeros((len(window.items), engine.dimensions), np.float32)
    reasons: dict[int, str] = {}

    def take(batch: int, result: Result, is_new: bool) -> None:
        vectors[places[batch]] = result[0]
        reasons.update({places[batch][place]: reason for place, reason in result[1].items()})
        on_batch(sum(window.items[place].length for place in places[batch]), len(places[batch]), is_new)

    for batch, result in finished.items():
        take(batch, result, False)
    missing = {
        batch: [window.items[place] for place in batch_places]
        for batch, batch_places in enumerate(places)
        if batch not in finished
    }
    if missing:
        results = suspects.embed(engine, window.number, missing) if engine.in_process else engine.embed(missing)
        for batch, result in results:
            if spool:
                spool.put(batch, result, at_once=(window.number, batch) in suspects)
            take(batch, result, True)
    return vectors, reasons


class Writer:
    """Writes windows on a background thread, one at a time; errors re-raise at the next put() or finish()."""

    def __init__(self, job: Job, journal: Journal, dimensions: int, on_progress: OnProgress) -> None:
        self.job, self.journal = job, journal
        about = {**job.about, "dimensions": dimensions, "dtype": job.dtype}
        width = dtypes.width(dimensions, job.dtype)
        shape = VectorLayout(job.dtype, dtypes.element(job.dtype), width, job.columns, about)
        self.output: Output = formats.kind(job.output, job.dtype)(job.partial, shape, journal.totals.sizes)
        self.rejects = outputs.open_truncated(job.partial / REJECTS, journal.totals.sizes.get(REJECTS, 0))
        self._on_progress = on_progress
        self._before = journal.totals
        self._pool = ThreadPoolExecutor(1, "writer")
        self._last: Future[None] | None = None
        self._tokens = self._rows = self._new_tokens = self._new_rows = 0
        self._fraction = self._window_start = 0.0
        self._window: Window | None = None
        self._window_rows = 0
        self._since = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for file in (self.output, self.rejects):
            with contextlib.suppress(OSError):  # the disk is full, which has been reported already
                file.close()

    def begin(self, window: Window) -> None:
        """Report that `window` is computed next."""
        if self._window is not None:
            self._window_start = self._window.share_read
        self._window, self._window_rows = window, 0

    def report(self, tokens: int, rows: int, is_new: bool = True) -> None:
        """Report that `rows` more texts have vectors; `is_new`: this run computed them."""
        self._tokens, self._rows, self._window_rows = self._tokens + tokens, self._rows + rows, self._window_rows + rows
        if is_new:
            self._new_tokens, self._new_rows = self._new_tokens + tokens, self._new_rows + rows
        if self._window is not None:
            share = self._window_rows / max(len(self._window.items), 1)
            self._fraction = self._window_start + (self._window.share_read - self._window_start) * min(share, 1.0)
        vectors, total = self._before.vectors + self._rows, self._before.tokens + self._tokens
        seconds = max(time.monotonic() - self._since, 1e-9)
        totals = replace(self.journal.totals, vectors=vectors, tokens=total)
        self._on_progress(Progress(totals, self._fraction, self._new_rows / seconds, self._new_tokens / seconds))

    def put(self, window: Window, results: Result) -> None:
        """Write a window once the previous one has been written."""
        self._wait()
        self._last = self._pool.submit(self._write, window, results)

    def finish(self) -> None:
        """Wait for the last write, then complete the files."""
        self._wait()
        self.output.finish(self.journal.totals.vectors)
        self.output.sizes()
        self._window, self._fraction = None, 1.0
        self.report(0, 0)
        self.journal.record(replace(self.journal.totals, ended=True))

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _write(self, window: Window, results: Result) -> None:
        block, rejects = _separate_rejects(window, results, self.job, self.output.unfit)
        if self.job.strict and rejects:
            raise BadInput(f"{rejects[0].place}: {rejects[0].reason} (--strict)")
        self.rejects.write(outputs.lines([reject.record for reject in rejects]))
        if block.ids:
            self.output.write(block)
        sizes = self.output.sizes()
        sync(self.rejects)
        totals = self.journal.totals
        self.journal.record(
            Totals(
                windows=window.number + 1,
                mark=window.end,
                sizes={**sizes, REJECTS: self.rejects.tell()},
                vectors=totals.vectors + len(block.ids),
                rejected=totals.rejected + len(rejects),
                tokens=totals.tokens + window.tokens,
            )
        )


def embed_window(
    window: Window, engine: Engine, suspects: Suspects, job: Job, unfit: Unfit
) -> tuple[VectorBlock, list[Reject]]:
    """The stored vectors of a window, and its rows without a vector."""
    return _separate_rejects(window, compute(window, engine, None, suspects, lambda *_: None), job, unfit)


def _separate_rejects(window: Window, results: Result, job: Job, unfit: Unfit) -> tuple[VectorBlock, list[Reject]]:
    """The stored vectors of a window, and its rejects."""
    vectors, reasons = results
    stored = dtypes.encode(vectors, job.dtype)
    block = _block(window, stored, job.columns, reasons)
    if unfit_rows := unfit(block):
        places = [place for place in range(len(window.items)) if place not in reasons]
        reasons = reasons | {places[index]: reason for index, reason in unfit_rows.items()}
        block = _block(window, stored, job.columns, reasons)
    rejects = [
        Reject(window.items[place].place, window.items[place].id, reason, window.items[place].text)
        for place, reason in sorted(reasons.items())
    ]
    return block, [*window.rejects, *rejects]


def _block(window: Window, vectors: Any, columns: Sequence[str], reasons: Mapping[int, str]) -> VectorBlock:
    places = [place for place in range(len(window.items)) if place not in reasons]
    items = [window.items[place] for place in places]
    return VectorBlock(
        vectors if not reasons else vectors[places],
        [item.id for item in items],
        {name: [item.columns.get(name) for item in items] for name in columns},
    )
