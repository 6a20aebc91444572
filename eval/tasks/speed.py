"""Speed and memory: the same texts to both sides in turns, at several batch sizes and lengths.

Both sides run all the time. Before each batch size and length, each side answers one uncounted request to warm up; then they
take turns, one request each, and the starting side alternates. A ratio comes from the two requests of a round, adjacent in
time, so that whatever slows the machine for a while affects both.

The output is the `speed` part of a result: `candidate` and `baseline` (what ran, and its `memory` in bytes afterwards, null if
unknown), `notes`, and `shapes`: `batch` (texts per request), `tokens` (per text), `requests` (per side), for each side
`texts_per_second` and `tokens_per_second` (from the median request), `p50` and `p99` (seconds per request), and `ratio`
(candidate over baseline in texts per second) with `low` and `high`, which contain 90% of the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qembed.command.progress import reporter
from qembed.errors import BadInput
from qembed.vectors.sources import Side, Source

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

LEAST, MOST = 5, 50
SECONDS = 10.0
MOST_TOKENS = 4096
"""Of one request: more would take minutes on a CPU."""
PIECES = 400
TIMEOUT = 600.0

Send = Callable[[Sequence[str]], object]


@dataclass(frozen=True)
class RequestShape:
    """A request of `batch` texts of `tokens` tokens each."""

    batch: int
    tokens: int


def shapes(batches: Sequence[int], lengths: Sequence[int], limit: int | None) -> tuple[list[RequestShape], list[str]]:
    """All combinations that fit the models and MOST_TOKENS, and notes about those left out.

    Raises:
        BadInput: none is left.
    """
    requested = [RequestShape(batch, tokens) for tokens in lengths for batch in batches]
    within = [shape for shape in requested if limit is None or shape.tokens <= limit]
    fitting = [shape for shape in within if shape.batch * shape.tokens <= MOST_TOKENS or shape.batch == 1]
    notes = []
    if len(within) < len(requested):
        notes.append(f"lengths over the context of {limit} tokens are left out")
    if len(fitting) < len(within):
        notes.append(f"requests of more than {MOST_TOKENS} tokens are left out")
    if not fitting:
        raise BadInput(f"--speed-lengths: all are over the context of {limit} tokens")
    return fitting, notes


def texts(shape: RequestShape, pool: Sequence[str], tokenizer: Tokenizer | None, first: int) -> list[str]:
    """The texts of a request, each starting at another word of `pool`.

    So a prefix cache, if a server has one, meets no text twice. Without a tokenizer a word counts as a token.
    """
    texts_of_request = []
    for number in range(first, first + shape.batch):
        words = [pool[(number * 7 + place) % len(pool)] for place in range(shape.tokens + 1)]
        text = " ".join([f"{number}:", *words])
        texts_of_request.append(
            _shortened(text, tokenizer, shape.tokens) if tokenizer else " ".join(text.split()[: shape.tokens])
        )
    return texts_of_request


def measure(
    candidate: Side,
    baseline: Side,
    chosen: Sequence[RequestShape],
    pool: Sequence[str],
    tokenizer: Tokenizer | None,
    progress: Console,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The `speed` part of a result.

    Raises:
        QembedError: a side cannot be started, or fails.
    """
    with reporter("opening both sides", progress) as shown, ExitStack() as stack:
        sources = {}
        for name, side in (("candidate", candidate), ("baseline", baseline)):
            sources[name] = stack.enter_context(side.open(lambda stage, name=name: shown.stage(f"{name}: {stage}")))  # type: ignore[misc]
        sends = {name: stack.enter_context(_sending(source)) for name, source in sources.items()}
        shapes_measured = []
        for number, shape in enumerate(chosen):
            shown.steps("speed", number, len(chosen), f"request shapes, now {shape.batch} × {shape.tokens} tokens")
            shapes_measured.append(record(shape, rounds(shape, sends, pool, tokenizer)))
        sides = {name: {**_described(source), "memory": source.memory()} for name, source in sources.items()}
    return {**sides, "shapes": shapes_measured, "notes": [*notes, *unlike(sides["candidate"], sides["baseline"])]}


def unlike(candidate: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """The differences between the two sides besides the weights, a sentence each, so that the ratio is not attributed to the
    weights alone.
    """
    for name, what in (("engine", "ran through different engines"), ("version", "ran through different versions")):
        if candidate[name] != baseline[name] and (name == "engine" or candidate["engine"] == baseline["engine"]):
            yield f"the two sides {what} ({candidate[name]}, {baseline[name]}), so the ratio is not that of the weights alone"
    for name, what in (("device", "on"), ("dtype", "in")):
        left, right = candidate[name], baseline[name]
        if left is None or right is None:
            yield f"the {name} of a side is not known, so the ratio may not be that of the weights alone"
        elif left != right:
            yield f"the two sides computed {what} {left} and {what} {right}, so the ratio is not that of the weights alone"


def rounds(
    shape: RequestShape, sends: dict[str, Send], pool: Sequence[str], tokenizer: Tokenizer | None
) -> dict[str, list[float]]:
    """Seconds of each request of either side, round by round; LEAST rounds at least, then until SECONDS are over."""
    for send in sends.values():
        send(texts(shape, pool, tokenizer, 0))
    seconds: dict[str, list[float]] = {name: [] for name in sends}
    order = list(sends)
    began = time.monotonic()
    for number in range(1, MOST + 1):
        batch = texts(shape, pool, tokenizer, number * shape.batch)
        for name in order:
            started = time.perf_counter()
            sends[name](batch)
            seconds[name].append(time.perf_counter() - started)
        order.reverse()
        if number >= LEAST and time.monotonic() - began > SECONDS:
            break
    return seconds


def record(shape: RequestShape, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The entry of a request shape in the result, from the seconds of its rounds."""
    sides = {}
    for name, values in seconds.items():
        p50, p99 = np.percentile(values, [50, 99])
        per_second = shape.batch / float(p50)
        sides[name] = {
            "texts_per_second": per_second,
            "tokens_per_second": per_second * shape.tokens,
            "p50": float(p50),
            "p99": float(p99),
        }
    ratios = np.array(seconds["baseline"]) / np.array(seconds["candidate"])
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    return {
        "batch": shape.batch,
        "tokens": shape.tokens,
        "requests": len(ratios),
        **sides,
        "ratio": float(middle),
        "low": float(low),
        "high": float(high),
    }


@contextmanager
def _sending(source: Source) -> Iterator[Send]:
    """A function that sends one request and waits for its vectors, over a persistent connection."""
    if source.url is None:
        yield lambda batch: source.embed(batch, lambda _: None)
        return
    from qembed.client import embeddings

    with embeddings.connected(source.url, TIMEOUT, source.api_key) as api:
        fields = dict(source.fields) or None
        yield lambda batch: api.embeddings.create(model=str(source.served), input=list(batch), extra_body=fields)


def _described(source: Source) -> dict[str, Any]:
    return {name: getattr(source, name) for name in ("engine", "version", "model", "weights", "device", "dtype")}


def _shortened(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    from qembed.eval.texts import cut

    return cut([text], tokenizer, tokens).texts[0]
