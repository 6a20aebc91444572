"""vLLM's app as the gate uses it: a request for vectors or scores, texts that may end the engine, results not finite."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qembed.serve.gate import response
from qembed.serve.gate.asgi import App, Disconnected, Message, Receive, Scope, collect, maybe_threaded
from qembed.serve.gate.errors import Refused, bad
from qembed.serve.gate.metrics import Metrics
from qembed.serve.gate.request import Batch
from qembed.serve.gate.suspects import MAX_DEATHS, Suspects
from qembed.vllm import internals
from qembed.vllm.gate_rules import Rules

BLOCK = 32  # tokens; a multiple of every block size in settings.BLOCK_SIZE
PART_TEXTS = 512
PART_CHARACTERS = 2**18
"""Enough for many steps of the engine, so that little is lost between parts, and few enough for a few milliseconds of JSON."""
POOLING = "/pooling"
FILLER = "word "
MAX_FILLERS = 8
MAX_AT_FAULT = 8
"""Non-finite vectors after which a request is refused without a look at the others, so that a broken model costs little."""
REPLACED_HEADERS = (
    *(b"content-length", b"content-type", b"content-encoding", b"transfer-encoding", b"accept-encoding"),
    b"x-request-id",  # vLLM takes it for its own id of the request, and two clients may send the same
)


@dataclass
class Computed:
    """vLLM's answer to a batch: its status and, if it came in one part, bytes; if the status is 200 also what they say.

    `nonfinite` are the indices of vectors that have NaN or infinity.
    """

    status: int
    raw: bytes | None
    answer: dict[str, Any] = field(default_factory=dict)
    nonfinite: list[int] = field(default_factory=list)


class Engine:
    """vLLM's `app`. `compute` turns a batch into an answer with finite vectors."""

    def __init__(self, app: App, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._suspects = Suspects(2 * rules.max_queue, rules.suspects)
        self._one_suspect = asyncio.Lock()
        # Scores come as numbers from /v1/score, where NaN fails in vLLM, and from /pooling as bytes, like vectors.
        self._route: dict[str, Any] = {} if rules.instruction is None else {"path": POOLING, "raw_path": POOLING.encode()}
        self._fields: dict[str, Any] = {} if rules.instruction is None else {"task": "classify", "encoding_format": "base64"}

    def check(self, batch: Batch) -> None:
        """Refuse a batch that has a text that ended the engine twice.

        Raises:
            Refused: 400, with the index of the text.
        """
        for index, text in enumerate(batch.inputs):
            if self._suspects.deaths(text) >= MAX_DEATHS:
                raise bad(
                    f"{batch.name(index)} ended the engine {MAX_DEATHS} times and is refused until the server is started anew; "
                    "please report it, with the model",
                    "deadly",
                    batch.name(index).partition("[")[0],
                )

    async def compute(self, scope: Scope, receive: Receive, batch: Batch) -> Computed:
        """vLLM's answer for `batch`. Texts that were in flight when the engine died are computed one at a time.

        Many texts, or long ones, go to vLLM in parts, one after the other: it handles the JSON of a request in the event loop.
        """
        suspects = [index for index, text in enumerate(batch.inputs) if self._suspects.deaths(text)]
        others = sorted(set(range(len(batch.inputs))) - set(suspects)) if suspects else range(len(batch.inputs))
        parts: list[tuple[Sequence[int], dict[str, Any]]] = []
        nonfinite: list[int] = []
        raw: bytes | None = None
        for indices in [*split(batch.inputs, others), *([index] for index in suspects)]:
            if indices[0] in suspects:
                async with self._one_suspect:
                    self.check(batch)  # another request may have shown meanwhile that it is deadly
                    status, raw = await self._tracked(scope, receive, batch, indices)
            else:
                status, raw = await self._tracked(scope, receive, batch, indices)
            if status != 200:
                return Computed(status, raw)
            answer, wrong = await maybe_threaded(len(raw), response.read, raw)
            parts.append((indices, answer))
            nonfinite += [indices[position] for position in wrong]
        return Computed(200, raw if len(parts) == 1 else None, response.join(parts), sorted(nonfinite))

    async def _tracked(self, scope: Scope, receive: Receive, batch: Batch, indices: Any) -> tuple[int, bytes]:
        inputs = [batch.inputs[index] for index in indices]
        with self._suspects.in_flight(inputs) as flight:
            try:
                status, raw = await self.ask(scope, receive, {**batch.body, "input": inputs})
                flight.answered = status == 200
            finally:
                flight.died = is_dead(scope)
        return status, raw

    async def recompute(
        self, scope: Scope, receive: Receive, batch: Batch, answer: dict[str, Any], nonfinite: list[int]
    ) -> list[int]:
        """Compute the vectors at the indices `nonfinite` again, into `answer`. Returns the first indices that stay non-finite.

        vLLM does not clear a cache block before it gives it to the next text, and attention multiplies what lies beyond the
        end of a text by zero, so NaN left there by an earlier text comes through. Hence the blocks are overwritten first.
        All texts are computed together, and then those that are still non-finite one at a time, because a text that is at
        fault spoils others that the engine computes after it.
        """
        if not nonfinite:
            return nonfinite
        freed = cached_tokens(answer)
        nonfinite, freed = await self._again(scope, receive, batch, answer, nonfinite, freed)
        at_fault: list[int] = []
        for index in nonfinite:
            if len(at_fault) < MAX_AT_FAULT:
                wrong, freed = await self._again(scope, receive, batch, answer, [index], freed)
                at_fault += wrong
        if at_fault:
            await self._overwrite_cache(scope, receive, freed)
        return at_fault

    async def _again(
        self, scope: Scope, receive: Receive, batch: Batch, answer: dict[str, Any], indices: list[int], freed: int
    ) -> tuple[list[int], int]:
        """Overwrite `freed` tokens of the cache and compute the texts at `indices` again, into `answer`.

        Returns the indices that are still non-finite, and the tokens that are to be overwritten next.
        """
        self._metrics.recomputed.inc(len(indices))
        await self._overwrite_cache(scope, receive, freed)
        status, raw = await self.ask(scope, receive, {**batch.body, "input": [batch.inputs[index] for index in indices]})
        if status != 200:
            return indices, freed
        again, wrong = await maybe_threaded(len(raw), response.read, raw)
        return response.replace(answer, indices, again, wrong), cached_tokens(again)

    async def _overwrite_cache(self, scope: Scope, receive: Receive, tokens: int) -> None:
        """Overwrite the cache blocks that texts of `tokens` tokens just freed: vLLM reuses the last freed blocks first."""
        longest = self._rules.max_model_len // BLOCK * BLOCK
        length = min(-(-tokens // BLOCK) * BLOCK, longest)
        if length:
            texts = [FILLER * length] * min(-(-tokens // length), MAX_FILLERS)
            body = {"input": texts, "encoding_format": "base64", "truncate_prompt_tokens": length}
            await self.ask(scope, receive, body)

    async def ask(self, scope: Scope, receive: Receive, content: dict[str, Any]) -> tuple[int, bytes]:
        """vLLM's status and answer to the request `content`.

        A client that disconnects ends the computation, as with vLLM alone.

        Raises:
            Disconnected: it did.
            Refused: 500, vLLM failed without an answer.
        """
        body = json.dumps({**self._fields, **content}).encode()
        sent = False

        async def receive_body() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in REPLACED_HEADERS]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        try:
            status, raw = await collect(self._app, {**scope, **self._route, "headers": headers}, receive_body)
        except Exception as error:
            raise Refused(500, f"vLLM failed: {type(error).__name__}", "engine", None) from error
        if not status or raw == b"null":
            raise Disconnected
        return status, raw


def split(inputs: Sequence[str | list[int]], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """`indices` in parts of at most PART_TEXTS texts and about PART_CHARACTERS characters (or token ids) of `inputs`."""
    start = characters = 0
    for position, index in enumerate(indices):
        size = len(inputs[index])
        if position > start and (position - start == PART_TEXTS or characters + size > PART_CHARACTERS):
            yield indices[start:position]
            start, characters = position, 0
        characters += size
    if start < len(indices):
        yield indices[start:]


def cached_tokens(answer: dict[str, Any]) -> int:
    """At least the tokens of the cache blocks that the texts of vLLM's `answer` took."""
    return answer["usage"]["prompt_tokens"] + BLOCK * len(answer["data"])


def is_dead(scope: Scope) -> bool:
    """Whether vLLM knows that its engine has died."""
    return internals.has_dead_engine(scope.get("app"))
