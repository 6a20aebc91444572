"""What stands before vLLM's own server, inside its process: keys, routes, limits, cleaning, and a look at every vector.

vLLM's `--middleware` takes the class `Gate` and wraps its app in it, outermost. A request for vectors goes through like this:

    route and key → body, up to a size → `request.read`: checked, cleaned, prompt put before → `Load.admitted`: a place, or 503
    → vLLM's app, asked for base64 → `vectors`: no NaN, and the encoding that the client wanted

Everything else that is allowed goes straight to vLLM's app; what is not in ROUTES does not exist.
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
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

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
BODY_SECONDS = 30.0
IN_A_THREAD = 2**15
TRIES = 2
BLOCK = 32  # tokens; a multiple of every block size in settings.BLOCK_SIZE
FILLER = "word "
MOST_FILLERS = 8
REQUEST_ID = "x-request-id"  # vLLM's, where the user has asked for it

RULES: Rules | None = None
"""Set by server_process before vLLM makes the gate: its `--middleware` takes a class and no arguments."""
LOAD: list[Load] = []
"""The load of the gate that vLLM has made, for whoever stops the process."""


class Gate:
    """An ASGI app around vLLM's."""

    def __init__(self, app: App, rules: Rules | None = None) -> None:
        chosen = rules or RULES
        assert chosen is not None, "qembed.serve.gate.RULES is not set"
        self.app = app
        self.rules = chosen
        self.load = Load(chosen.max_queue, chosen.max_body)
        LOAD[:] = [self.load]
        self.metrics = Metrics(chosen, self.load)
        self.document = openapi.document(chosen)
        self._tokenizer: Any = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        if path != EMBEDDINGS:
            try:
                self._check_route(scope)
            except Refused as refused:
                await _answer(send, refused.status, refused.body(), refused.headers)
                return
            if path == "/openapi.json":
                await _answer(send, 200, self.document)
            else:
                await self.app(scope, receive, send)
            return
        start = time.monotonic()
        status = 500
        try:
            status, body, headers = await self._embeddings(scope, receive)
        except Refused as refused:
            status, body, headers = refused.status, refused.body(), refused.headers
            self.metrics.refused.labels(refused.reason).inc()
        except _Gone:
            self.metrics.requests.labels("gone").inc()
            return
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - start)
        await _answer(send, status, body, headers)

    def _check_route(self, scope: MutableMapping[str, Any]) -> None:
        path, method = scope["path"], scope["method"]
        if path not in OPEN and self.rules.keys and not api_keys.is_known(_header(scope, b"authorization"), self.rules.keys):
            raise Refused(
                401, "no key, or a wrong one: send Authorization: Bearer KEY", "key", None, {"www-authenticate": "Bearer"}
            )
        if path not in ROUTES:
            raise Refused(404, f"no such route; there are {', '.join(sorted(ROUTES))}", "route", None)
        if method != ROUTES[path]:
            raise Refused(405, f"{path} takes {ROUTES[path]}", "route", None, {"allow": ROUTES[path]})

    async def _embeddings(self, scope: MutableMapping[str, Any], receive: Receive) -> tuple[int, bytes, dict[str, str]]:
        self._check_route(scope)
        if self.load.draining:
            raise self.load.stopping()
        kind = (_header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send Content-Type: application/json", "type", None)
        with self.load.body() as add:
            raw = await self._body(scope, receive, add)
            # Reading and cleaning takes the longer the larger it is; others are to be answered meanwhile.
            batch = await _maybe_threaded(len(raw), request.read, raw, self.rules, self._count)
            if self.rules.log_texts:
                print(gate_rules.TEXTS + json.dumps({"texts": list(batch.inputs)}, ensure_ascii=False), flush=True)
            with self.load.admitted(len(batch.inputs)):
                status, raw = await self._ask(scope, receive, batch.body)
                if status != 200:
                    return self._failed(scope, status, raw)
                said, bad = await _maybe_threaded(len(raw), response.read, raw)
                mended = bool(bad)
                bad = await self._again(scope, receive, batch, said, bad)
                if bad:
                    self.metrics.nonfinite.inc(len(bad))
                    raise response.refused(bad[0])
                body = raw
                if mended or batch.encoding != "base64":
                    body = await _maybe_threaded(len(raw), response.write, said, batch.encoding)
        self.metrics.texts.inc(len(batch.inputs))
        self.metrics.tokens.inc(said["usage"]["prompt_tokens"])
        named = scope.get("state", {}).get(REQUEST_ID)
        return 200, body, {REQUEST_ID: named} if named else {}

    async def _again(
        self, scope: MutableMapping[str, Any], receive: Receive, batch: request.Batch, said: dict[str, Any], bad: list[int]
    ) -> list[int]:
        """Compute once more what is not finite; what still is not.

        vLLM does not clear a block of its cache before it gives it to the next text, and attention multiplies what is beyond
        the end of a text by nought: NaN that an earlier text left there comes out. So the blocks are written over first.
        """
        tokens = said["usage"]["prompt_tokens"] + BLOCK * len(batch.inputs)
        for _ in range(TRIES):
            if not bad:
                return bad
            self.metrics.recomputed.inc(len(bad))
            await self._write_over(scope, receive, tokens)
            status, raw = await self._ask(scope, receive, {**batch.body, "input": [batch.inputs[place] for place in bad]})
            if status != 200:
                break
            bad = response.mend(said, bad, *response.read(raw))
        if bad:
            await self._write_over(scope, receive, tokens)
        return bad

    async def _write_over(self, scope: MutableMapping[str, Any], receive: Receive, tokens: int) -> None:
        """Fill the blocks that texts of `tokens` tokens have just left; vLLM gives those out first that were freed last."""
        longest = self.rules.max_model_len // BLOCK * BLOCK
        length = min(-(-tokens // BLOCK) * BLOCK, longest)
        if length:
            texts = [FILLER * length] * min(-(-tokens // length), MOST_FILLERS)
            await self._ask(scope, receive, {"input": texts, "encoding_format": "base64", "truncate_prompt_tokens": length})

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            from qembed.checkpoint.find import find

            self._tokenizer = find(self.rules.folder).tokenizer()
        return len(self._tokenizer.encode(text).ids)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive, add: Callable[[int], None]) -> bytes:
        limit = self.rules.max_body
        # The connection stays open, and uvicorn drops the rest as it comes: a client that has not sent all of it yet would
        # see a reset in place of the answer.
        too_large = Refused(413, f"the request has more than {limit} bytes (--max-body)", "size", None)
        said = _header(scope, b"content-length") or "0"
        if said.isdecimal() and int(said[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large
                    add(len(part))
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(
                408, f"the request did not come whole within {BODY_SECONDS:g} s", "slow", None, {"connection": "close"}
            ) from None

    async def _ask(self, scope: MutableMapping[str, Any], receive: Receive, asked: dict[str, Any]) -> tuple[int, bytes]:
        """vLLM's status and answer. A client that goes away ends the computation, as it does with vLLM alone."""
        body = json.dumps(asked).encode()
        sent = False

        async def give() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        status = 0
        parts: list[bytes] = []

        async def take(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [value.decode("latin-1") for name, value in message["headers"] if name.lower() == REQUEST_ID.encode()]
                scope.setdefault("state", {})[REQUEST_ID] = ids[0] if ids else None
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        names = (b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        try:
            await self.app({**scope, "headers": headers}, give, take)
        except Exception as error:
            if not status:
                raise Refused(500, f"vLLM failed: {type(error).__name__}", "engine", None) from error
        raw = b"".join(parts)
        if not status or raw == b"null":
            raise _Gone
        return status, raw

    def _failed(self, scope: MutableMapping[str, Any], status: int, raw: bytes) -> tuple[int, bytes, dict[str, str]]:
        """An error of vLLM's: the client's as it is, and one that a second try may mend as 503."""
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if status >= 500 and self.load.draining:
            raise self.load.stopping()
        if status >= 500 and getattr(engine, "errored", False):
            raise Refused(503, "the engine ended; it is being started again", "engine", None, {"retry-after": "30"})
        if status == 503:
            raise self.load.busy("vLLM's queue is full")
        return status, raw, {}


class _Gone(Exception):
    """The client closed the connection."""


def _header(scope: MutableMapping[str, Any], name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


async def _maybe_threaded(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, in a thread if it has `size` bytes to work through and so many that others would wait for it."""
    return function(*arguments) if size <= IN_A_THREAD else await asyncio.to_thread(function, *arguments)


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
