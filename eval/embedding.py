"""Vectors of one side: from the cache if there, otherwise from the side itself, which is opened only when needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed.command.progress import reporter
from qembed.errors import QembedError
from qembed.eval import arrays
from qembed.vectors import cache
from qembed.vectors.sources import Side, Source

if TYPE_CHECKING:
    from rich.console import Console

CHUNK = 64
SENTINEL = "qembed looks whether this server still gives the vectors that it gave before."
"""A text whose vector tells whether a server still runs the same model. Changing it would discard every cache."""
SAME = 0.9999
"""Cosine from which two vectors of a text count as vectors of the same model."""
DESCRIPTION = ("engine", "version", "model", "weights", "device", "dtype", "kernel", "url")
"""Fields of a `Source` that describe a side in the result."""
NOTE = "said"
"""The name of the note with these fields in the cache; caches of earlier versions have it."""


class Embedder:
    """Computes vectors of a side; a context manager that closes what it opened.

    Vectors are cached after every CHUNK texts, so that an interrupted run can be continued.
    """

    def __init__(self, side: Side, name: str, folder: Path | None, progress: Console) -> None:
        self.side, self.name = side, name
        self._folder, self._progress = folder, progress
        self._stack = ExitStack()
        self._source: Source | None = None
        self._computed = self._from_cache = 0
        self._seconds = 0.0

    def __enter__(self) -> Embedder:
        self._cache = self._stack.enter_context(cache.opened(self._folder, self.side.identity))
        if self.side.live and self._cache.count():
            self._check_sentinel()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def vectors(self, inputs: Sequence[str], what: str) -> NDArray[np.float32]:
        """The vectors [len(inputs), d] float32 of texts with their prompts; large arrays are in a file, not in memory.

        `what` is the label of the progress bar.

        Raises:
            QembedError: the side cannot be opened, or fails; vectors computed so far stay in the cache.
        """
        digests = [cache.digest(text) for text in inputs]
        known = self._cache.known(digests)
        missing = {digest: text for digest, text in zip(digests, inputs, strict=True) if digest not in known}
        self._from_cache += len(set(digests) & known)
        if missing:
            self._compute(missing, what)
        out = arrays.empty((len(inputs), self._cache.dimension(digests[0])), self._folder)
        self._cache.fill(digests, out)
        return out

    def description(self) -> dict[str, Any]:
        """The description of the side for the result: `seconds` cover only the `computed` texts; `from_cache` were cached."""
        fields = self._source_fields()
        return {
            **{name: fields.get(name) for name in DESCRIPTION},
            "url": fields["url"] if self.side.live else None,
            "bytes": self.side.size,
            "seconds": round(self._seconds, 3),
            "computed": self._computed,
            "from_cache": self._from_cache,
        }

    def _compute(self, missing: dict[bytes, str], what: str) -> None:
        source = self._opened()
        # Texts of similar length need little padding; starting with the longest shows at once whether the memory suffices.
        pairs = sorted(missing.items(), key=lambda pair: -len(pair[1]))
        description = f"{self.name}: {source.model} through {source.engine}"
        cached = embedded = 0
        with reporter(description, self._progress) as progress:

            def on_texts(count: int) -> None:
                nonlocal embedded
                embedded += count
                progress.steps(description, embedded, len(pairs), what)

            on_texts(0)
            started = time.monotonic()
            try:
                for start in range(0, len(pairs), CHUNK):
                    chunk = pairs[start : start + CHUNK]
                    vectors = source.embed([text for _, text in chunk], on_texts)
                    self._cache.put([digest for digest, _ in chunk], vectors)
                    cached += len(chunk)
            except QembedError as error:
                raise type(error)(f"{error}{self._advice(cached, len(pairs))}") from error
            finally:
                self._computed += cached
                self._seconds += time.monotonic() - started

    def _advice(self, cached: int, total: int) -> str:
        """End of an error message: the vectors in the cache, and how to continue."""
        if self._folder is None or not cached:
            return ""
        return f" ({cached} of {total} vectors are in the cache {self._folder}: run the same command to continue)"

    def _opened(self) -> Source:
        if self._source is None:
            with reporter(f"{self.name}: opening", self._progress) as progress:
                source = self._stack.enter_context(self.side.open(lambda stage: progress.stage(f"{self.name}: {stage}")))
            self._source = source
            self._cache.note(NOTE, {name: getattr(source, name) for name in DESCRIPTION})
            if self.side.live and not self._cache.known([cache.digest(SENTINEL)]):
                self._cache.put([cache.digest(SENTINEL)], source.embed([SENTINEL], lambda _: None))
        return self._source

    def _source_fields(self) -> dict[str, Any]:
        if self._source is None and self._cache.read_note(NOTE) is None:
            self._opened()
        fields: dict[str, Any] = self._cache.read_note(NOTE)
        return fields

    def _check_sentinel(self) -> None:
        """Clear the cache of a server that now returns other vectors: another model behind the same URL and name."""
        sentinel = cache.digest(SENTINEL)
        if self._cache.known([sentinel]):
            with self.side.open(lambda _: None) as source:
                now = source.embed([SENTINEL], lambda _: None).astype(np.float64)[0]
            before = np.empty((1, self._cache.dimension(sentinel)), np.float32)
            self._cache.fill([sentinel], before)
            lengths = np.linalg.norm(now) * np.linalg.norm(before[0])
            if len(now) == before.shape[1] and now @ before[0] >= SAME * lengths > 0:
                return
            self._progress.print(f"{self.name}: the server returns other vectors than before; its cached vectors are discarded")
        self._cache.clear()
