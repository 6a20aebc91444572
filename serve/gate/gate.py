"""The gate in front of vLLM's app: keys, routes, limits, text cleaning, and a check of every vector.

vLLM's `--middleware` wraps its app in the class `Gate`, as the outermost layer. The way of a request for vectors:

    route and key → body, up to --max-body → `request.read`: validate, clean, prepend the prompt → `Load.admitted`: a place in
    the queue, or 503 → vLLM's app, asked for base64 → `response`: no NaN or infinity, in the encoding the client asked for

The other routes in ROUTES go straight to vLLM's app, except for /openapi.json. All else is 404.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qembed.serve.gate import openapi, request, response
from qembed.serve.gate.errors import Refused
from qembed.serve.gate.metrics import Metrics
from qembed.serve.gate.overload import Load
from qembed.vllm import api_keys, gate_rules
from qembed.vllm.gate_rules import Rules

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = tuple[int, bytes, dict[str, str]]
"""Status, body and further headers."""

EMBEDDINGS = "/v1/embeddings"
ROUTES = {
    "/health": "GET",
    "/version": "GET",
    "/metrics": "GET",
    "/openapi.json": "GET",
    "/v1/models": "GET",
    EMBEDDINGS: "POST",
}
OPEN = {"/health"}
"""Routes that need no key."""
BODY_SECONDS = 30.0
THREAD_BYTES = 2**15
"""Larger bodies are processed in a thread, so that other requests are answered meanwhile."""
RETRIES = 2
BLOCK = 32  # tokens; a multiple of every block size in settings.BLOCK_SIZE
FILLER = "word "
MAX_FILLERS = 8
REQUEST_ID = "x-request-id"  # vLLM sends it if the user has enabled it

# vLLM imports the class that --middleware names and calls it with the app alone, so no rules can be passed to it, and nobody
# gets the object. Therefore two module globals: server_process sets RULES before vLLM starts, and reads LOAD to drain.
RULES: Rules | None = None
LOAD: list[Load] = []
"""The load of the gate in this process, once vLLM has created it."""


class Gate:
    """An ASGI app around vLLM's `app`. Without `rules` it follows the module's RULES."""

    def __init__(self, app: App, rules: Rules | None = None) -> None:
        rules = rules or RULES
        assert rules is not None, "qembed.serve.gate.gate.RULES is not set"
        self.app = app
        self.rules = rules
        self.load = Load(rules.max_queue, rules.max_body)
        LOAD[:] = [self.load]
        self.metrics = Metrics(rules, self.load)
        self.document = openapi.document(rules)
        self._tokenizer: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to vLLM."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == EMBEDDINGS:
            await self._answer_embeddings(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_route(scope)
        except Refused as refused:
            await _send(send, refused.status, refused.body(), refused.headers)
            return
        if scope["path"] == "/openapi.json":
            await _send(send, 200, self.document)
        else:
            await self.app(scope, receive, send)

    async def _answer_embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        try:
            status, body, headers = await self._embeddings(scope, receive)
        except Refused as refused:
            status, body, headers = refused.status, refused.body(), refused.headers
            self.metrics.refused.labels(refused.reason).inc()
        except _Disconnected:
            self.metrics.requests.labels("gone").inc()
            return
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - start)
        await _send(send, status, body, headers)

    def _check_route(self, scope: Scope) -> None:
        path, method = scope["path"], scope["method"]
        if path not in OPEN and self.rules.keys and not api_keys.is_known(_header(scope, b"authorization"), self.rules.keys):
            raise Refused(
                401, "no key, or a wrong one: send Authorization: Bearer KEY", "key", None, {"www-authenticate": "Bearer"}
            )
        if path not in ROUTES:
            raise Refused(404, f"no such route; there are {', '.join(sorted(ROUTES))}", "route", None)
        if method != ROUTES[path]:
            raise Refused(405, f"{path} takes {ROUTES[path]}", "route", None, {"allow": ROUTES[path]})

    async def _embeddings(self, scope: Scope, receive: Receive) -> Answer:
        self._check_route(scope)
        if self.load.draining:
            raise self.load.stopping()
        kind = (_header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send Content-Type: application/json", "type", None)
        with self.load.body() as reserve:
            raw = await self._body(scope, receive, reserve)
            batch = await _maybe_threaded(len(raw), request.read, raw, self.rules, self._count_tokens)
            if self.rules.log_texts:
                print(gate_rules.TEXTS + json.dumps({"texts": list(batch.inputs)}, ensure_ascii=False), flush=True)
            with self.load.admitted(len(batch.inputs)):
                return await self._compute(scope, receive, batch)

    async def _compute(self, scope: Scope, receive: Receive, batch: request.Batch) -> Answer:
        """Let vLLM compute the vectors, and those that are not finite once more."""
        status, raw = await self._ask_vllm(scope, receive, batch.body)
        if status != 200:
            return self._failed(scope, status, raw)
        answer, nonfinite = await _maybe_threaded(len(raw), response.read, raw)
        changed = bool(nonfinite)
        nonfinite = await self._recompute(scope, receive, batch, answer, nonfinite)
        if nonfinite:
            self.metrics.nonfinite.inc(len(nonfinite))
            raise response.refused(nonfinite[0])
        body = raw
        if changed or batch.encoding != "base64":
            body = await _maybe_threaded(len(raw), response.write, answer, batch.encoding)
        self.metrics.texts.inc(len(batch.inputs))
        self.metrics.tokens.inc(answer["usage"]["prompt_tokens"])
        request_id = scope.get("state", {}).get(REQUEST_ID)
        return 200, body, {REQUEST_ID: request_id} if request_id else {}

    async def _recompute(
        self, scope: Scope, receive: Receive, batch: request.Batch, answer: dict[str, Any], nonfinite: list[int]
    ) -> list[int]:
        """Compute the vectors at the indices `nonfinite` again, into `answer`. Returns the indices that stay non-finite.

        vLLM does not clear a cache block before it gives it to the next text, and attention multiplies what lies beyond the
        end of a text by zero, so NaN left there by an earlier text comes through. Hence the blocks are overwritten first.
        """
        tokens = answer["usage"]["prompt_tokens"] + BLOCK * len(batch.inputs)
        for _ in range(RETRIES):
            if not nonfinite:
                return nonfinite
            self.metrics.recomputed.inc(len(nonfinite))
            await self._overwrite_cache(scope, receive, tokens)
            inputs = [batch.inputs[index] for index in nonfinite]
            status, raw = await self._ask_vllm(scope, receive, {**batch.body, "input": inputs})
            if status != 200:
                break
            nonfinite = response.replace(answer, nonfinite, *response.read(raw))
        if nonfinite:
            await self._overwrite_cache(scope, receive, tokens)
        return nonfinite

    async def _overwrite_cache(self, scope: Scope, receive: Receive, tokens: int) -> None:
        """Overwrite the cache blocks that texts of `tokens` tokens just freed: vLLM reuses the last freed blocks first."""
        longest = self.rules.max_model_len // BLOCK * BLOCK
        length = min(-(-tokens // BLOCK) * BLOCK, longest)
        if length:
            texts = [FILLER * length] * min(-(-tokens // length), MAX_FILLERS)
            body = {"input": texts, "encoding_format": "base64", "truncate_prompt_tokens": length}
            await self._ask_vllm(scope, receive, body)

    def _count_tokens(self, text: str) -> int:
        if self._tokenizer is None:
            from qembed.checkpoint.find import find

            self._tokenizer = find(self.rules.folder).tokenizer()
        return len(self._tokenizer.encode(text).ids)

    async def _body(self, scope: Scope, receive: Receive, reserve: Callable[[int], None]) -> bytes:
        """Read the body of a request; `reserve` is called with the size of each chunk."""
        limit = self.rules.max_body
        # No "connection: close" here: uvicorn discards the rest of the body as it comes. A client that is still sending would
        # see a reset instead of the answer.
        too_large = Refused(413, f"the request has more than {limit} bytes (--max-body)", "size", None)
        length = _header(scope, b"content-length") or "0"
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Disconnected
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise too_large
                    reserve(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise Refused(
                408,
                f"the request was not complete within {BODY_SECONDS:g} s",
                "slow",
                None,
                {"connection": "close"},
            ) from None

    async def _ask_vllm(self, scope: Scope, receive: Receive, content: dict[str, Any]) -> tuple[int, bytes]:
        """vLLM's status and answer to the request `content`.

        A client that disconnects ends the computation, as with vLLM alone.
        """
        body = json.dumps(content).encode()
        sent = False

        async def receive_body() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        status = 0
        chunks: list[bytes] = []

        async def collect(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [value.decode("latin-1") for name, value in message["headers"] if name.lower() == REQUEST_ID.encode()]
                scope.setdefault("state", {})[REQUEST_ID] = ids[0] if ids else None
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))

        replaced = (b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        try:
            await self.app({**scope, "headers": headers}, receive_body, collect)
        except Exception as error:
            if not status:
                raise Refused(500, f"vLLM failed: {type(error).__name__}", "engine", None) from error
        raw = b"".join(chunks)
        if not status or raw == b"null":
            raise _Disconnected
        return status, raw

    def _failed(self, scope: Scope, status: int, raw: bytes) -> Answer:
        """The answer for an error of vLLM's: 503 where a later try may succeed, else vLLM's own."""
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if status >= 500 and self.load.draining:
            raise self.load.stopping()
        if status >= 500 and getattr(engine, "errored", False):
            raise Refused(503, "the engine died; it is being restarted", "engine", None, {"retry-after": "30"})
        if status == 503:
            raise self.load.busy("vLLM's queue is full")
        return status, raw, {}


class _Disconnected(Exception):
    """The client closed the connection."""


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


async def _maybe_threaded(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, in a thread if the `size` bytes that it processes exceed THREAD_BYTES."""
    return function(*arguments) if size <= THREAD_BYTES else await asyncio.to_thread(function, *arguments)


async def _send(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
