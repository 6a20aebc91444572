"""The requests that servers get, their rate, and the memory of their processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from qembed.checkpoint.description import Checkpoint

PASSES = 3
LEAST_SECONDS, MOST_SECONDS = 6.0, 20.0


@dataclass(frozen=True)
class Load:
    """`requests` of texts of `length` tokens each; a pass sends them one after another."""

    name: str
    title: str
    length: int
    requests: Sequence[Sequence[Any]]


def loads(checkpoint: Checkpoint) -> list[Load]:
    """The three loads of the table, of random words; lengths are the tokenizer's, the final token included."""
    draw = random.Random(0)
    tokenizer = checkpoint.tokenizer()
    words = [word[1:] for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", word)]
    words = sorted(word for word in words if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1)

    def text(length: int) -> str:
        text = " " + " ".join(draw.choices(words, k=length - 1))
        assert len(tokenizer.encode(text).ids) == length
        return text

    batches = tuple(tuple(text(43) for _ in range(8)) for _ in range(8))
    return [
        Load("batches", "tokens/s, 64 texts of 43 tokens, batches of 8", 43, batches),
        Load("single", "tokens/s, one text of 43 tokens at a time", 43, tuple((text(43),) for _ in range(16))),
        Load("long", "tokens/s, texts of 1,000 tokens, one at a time", 1000, tuple((text(1000),) for _ in range(2))),
    ]


def rate(load: Load, ask: Callable[[Any], object], *, warm: bool = True) -> float:
    """Tokens per second: the median of some passes. A pass is cut off after MOST_SECONDS.

    With `warm` a first request is sent before.
    """
    if warm:
        ask(load.requests[0])
    start = time.perf_counter()
    rates: list[float] = []
    while len(rates) < PASSES or time.perf_counter() - start < LEAST_SECONDS:
        begin, tokens = time.perf_counter(), 0
        for texts in load.requests:
            ask(texts)
            tokens += load.length * len(texts)
            if time.perf_counter() - start > MOST_SECONDS:
                break
        rates.append(tokens / (time.perf_counter() - begin))
        if time.perf_counter() - start > MOST_SECONDS:
            break
    return statistics.median(rates)


class Api:
    """A connection to an OpenAI-compatible server that stays open."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self._path, self._model = parts.path.rstrip("/") + "/embeddings", model
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=600)

    def ask(self, texts: Sequence[str]) -> list[list[float]]:
        """The vectors of `texts`."""
        body = json.dumps({"model": self._model, "input": list(texts)})
        self._connection.request("POST", self._path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        payload = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"HTTP status {answer.status}: {payload[:300]!r}")
        return [item["embedding"] for item in json.loads(payload)["data"]]


def own_memory(pid: int) -> int:
    """Bytes that would become free if the process ended: its unique set size."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", rollup, re.MULTILINE)) * 1024


def shared_memory(pids: Iterable[int]) -> int:
    """Bytes of all `pids` together, shared pages counted once: the sum of their proportional set sizes (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(size) for size in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)) * 1024
    return total


class Peak:
    """Peak of a `measure` of memory while the block runs, sampled twice a second."""

    def __init__(self, measure: Callable[[], int]) -> None:
        self.bytes = measure()
        self._measure, self._end = measure, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._measure())

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            self.bytes = max(self.bytes, self._measure())


class LoadPeak:
    """Peak of a worker's memory while it loads, above its final memory; file pages do not count. Watches all vLLM workers."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> LoadPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def end(self, worker: int) -> int:
        """The peak of `worker` so far minus its present memory; stops watching."""
        self._end.set()
        self._thread.join()
        return self._peaks.get(worker, 0) - anonymous(worker)

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            for name in Path("/proc").glob("[0-9]*/comm"):
                with contextlib.suppress(OSError):
                    if name.read_text().startswith(("VLLM::Work", "VLLM::Engine")):
                        pid = int(name.parent.name)
                        self._peaks[pid] = max(self._peaks.get(pid, 0), anonymous(pid))


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
