"""The gate in front of vLLM's app: keys, routes, limits, text cleaning, and a check of every vector or score.

vLLM's `--middleware` wraps its app in the class `Gate`, as the outermost layer. The way of a request for vectors or scores:

    route and key → `body.read`: up to --max-body → `request.read`: validate, clean, prepend the prompt → `Load.admitted`: a
    place in the queue, or 503 → `Engine.compute`: vLLM's app, asked for base64 → `response`: no NaN or infinity, in the
    encoding the client asked for (`rerank_request`, `rerank_prompts` and `rerank_answer` for a reranker's scores)

The other routes in COMMON go straight to vLLM's app, except for /openapi.json. All else is 404.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qembed import installation
from qembed.serve.gate import body, long_texts, openapi, request, rerank_answer, response
from qembed.serve.gate.asgi import (
    SURPLUS,
    App,
    Disconnected,
    Message,
    Receive,
    Scope,
    Send,
    collect,
    header,
    maybe_threaded,
    respond,
)
from qembed.serve.gate.engine import Engine, is_dead
from qembed.serve.gate.errors import Refused, quoted
from qembed.serve.gate.metrics import Metrics
from qembed.serve.gate.overload import Load
from qembed.serve.gate.reader import Reader
from qembed.serve.gate.rerank_request import RERANK, SCORE
from qembed.vllm import api_keys, gate_rules, hosts
from qembed.vllm.gate_rules import Rules

EMBEDDINGS = "/v1/embeddings"
MODELS = "/v1/models"
COMMON = {
    "/health": "GET",
    "/version": "GET",
    "/metrics": "GET",
    "/openapi.json": "GET",
    MODELS: "GET",
}
EMBEDDER, RERANKER = dict.fromkeys([EMBEDDINGS], "POST"), dict.fromkeys([*RERANK, SCORE], "POST")
"""The routes that an embedder answers, and those that a reranker answers."""
OPEN = {"/health"}
"""Routes that need no key and may be called by any name, such as a probe's: they read nothing."""
LOGGED_TEXTS, LOGGED_CHARACTERS = 32, 1000
"""Texts of a request, and characters of each, that --log-requests logs."""
REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

# vLLM imports the class that --middleware names and calls it with the app alone, so no rules can be passed to it, and nobody
# gets the object. Therefore two module globals: server_process sets RULES before vLLM starts, and reads GATES to drain, and to
# replace keys.
RULES: Rules | None = None
GATES: list[Gate] = []
"""The gate in this process, once vLLM has created it."""


@dataclass
class Exchange:
    """A request and its answer, for the access log and the metrics; `key` is the name of its key."""

    id: str
    start: float
    key: str | None = None
    status: int = 0
    texts: int = 0
    tokens: int = 0


class Gate:
    """An ASGI app around vLLM's `app`. Without `rules` it follows the module's RULES."""

    def __init__(self, app: App, rules: Rules | None = None) -> None:
        rules = rules or RULES
        assert rules is not None, "qembed.serve.gate.gate.RULES is not set"
        self.app = app
        self.rules = rules
        self.keys: Mapping[str, str | None] = rules.keys
        largest = response.bytes_of(rules.max_batch, max(rules.dimensions, default=0), "float")
        self.load = Load(rules.max_queue, rules.max_body, rules.client_timeout, largest)
        self.metrics = Metrics(rules, self.load)
        self.engine = Engine(app, rules, self.metrics)
        self.document = openapi.document(rules)
        self._tasks, self._missing = (EMBEDDER, RERANKER) if rules.instruction is None else (RERANKER, EMBEDDER)
        self._routes = {**COMMON, **self._tasks}
        self._answers: Any = response if rules.instruction is None else rerank_answer
        self.reader = Reader(rules)
        GATES[:] = [self]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to vLLM."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        sent_id = header(scope, REQUEST_ID.encode()) or ""
        exchange = Exchange(sent_id if SANE_ID.fullmatch(sent_id) else secrets.token_hex(16), time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                fields = [(name, value) for name, value in message["headers"] if name.lower() != REQUEST_ID.encode()]
                message = {**message, "headers": [*fields, (REQUEST_ID.encode(), exchange.id.encode())]}
            await send(message)

        try:
            if scope["path"] in self._tasks:
                await self._answer_task(scope, receive, send_with_id, exchange)
            else:
                await self._pass_on(scope, receive, send_with_id, exchange)
        finally:
            if self.rules.access_log:
                self._log(scope, exchange)

    def _log(self, scope: Scope, exchange: Exchange) -> None:
        """Write a line about a request to standard output. Status 0: the client closed the connection."""
        fields = {
            "request_id": exchange.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": exchange.status,
            "seconds": round(time.monotonic() - exchange.start, 4),
            "texts": exchange.texts,
            "tokens": exchange.tokens,
            "key": exchange.key,
        }
        print(gate_rules.ACCESS + json.dumps(fields), flush=True)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        try:
            self._check_route(scope, exchange)
            if scope["path"] == "/openapi.json":
                await respond(send, 200, self.document)
            elif scope["path"] == "/version":
                await respond(send, 200, await self._version(scope, receive))
            elif scope["path"].startswith(MODELS + "/"):
                await respond(send, 200, await self._model(scope, receive))
            else:
                await self.app(scope, receive, send)
        except Refused as refused:
            await respond(send, refused.status, refused.body(), refused.headers)

    async def _version(self, scope: Scope, receive: Receive) -> bytes:
        """vLLM's answer with qembed's version, and the prompt for requests without one, which clients have to know."""
        _, raw = await collect(self.app, scope, receive)
        own = {
            "qembed": installation.version(),
            "task": "embed" if self.rules.instruction is None else "rerank",
            "instruction": self.rules.instruction,
            "default_prompt": self.rules.default_prompt,
            "model_prompt": self.rules.model_prompt,
        }
        return json.dumps({**json.loads(raw), **own}).encode()

    async def _model(self, scope: Scope, receive: Receive) -> bytes:
        """The entry of one model, as OpenAI's API has it; its name may have slashes."""
        name = scope["path"].removeprefix(MODELS + "/")
        _, raw = await collect(self.app, {**scope, "path": MODELS, "raw_path": MODELS.encode()}, receive)
        for model in json.loads(raw)["data"]:
            if model["id"] == name:
                return json.dumps(model).encode()
        raise Refused(404, f"the model {quoted(name)} does not exist; see {MODELS}", "model", "model")

    async def _answer_task(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        try:
            await self._results(scope, receive, send, exchange)
        except Refused as refused:
            self.metrics.refused.labels(refused.reason).inc()
            await self._respond(send, exchange, refused.status, refused.body(), refused.headers)
        except Disconnected:
            self.metrics.requests.labels("gone").inc()

    async def _respond(
        self, send: Send, exchange: Exchange, status: int, raw: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer a request for vectors or scores, and count it."""
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - exchange.start)
        if exchange.key is not None:
            self.metrics.count_key(exchange.key, exchange.texts, exchange.tokens)
        await respond(send, status, raw, headers)

    def _check_route(self, scope: Scope, exchange: Exchange) -> None:
        path, method = scope["path"], scope["method"]
        if path not in OPEN and self.rules.hosts is not None:
            _check_host(scope, self.rules.hosts)
        if path not in OPEN and self.keys:
            key = api_keys.matching(header(scope, b"authorization"), self.keys)
            if key is None:
                raise Refused(
                    401, "no key, or a wrong one: send Authorization: Bearer KEY", "key", None, {"www-authenticate": "Bearer"}
                )
            exchange.key = self.keys[key]
        route = MODELS if path.startswith(MODELS + "/") and path != MODELS + "/" else path
        if route in self._missing:
            kinds = ("an embedder", "a reranker") if self._missing is RERANKER else ("a reranker", "an embedder")
            raise Refused(404, f"this server has {kinds[0]}; {path} needs {kinds[1]}, served by itself", "route", None)
        if route not in self._routes:
            raise Refused(404, f"no such route; there are {', '.join(sorted(self._routes))}", "route", None)
        if method != self._routes[route]:
            allowed = "GET, HEAD" if self._routes[route] == "GET" else self._routes[route]
            raise Refused(405, f"{path} takes {self._routes[route]}", "route", None, {"allow": allowed})

    async def _results(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        self._check_route(scope, exchange)
        if self.load.draining:
            raise self.load.stopping()
        if scope.get("state", {}).get(SURPLUS):
            raise self.load.busy("all connections have a request (--max-connections)")
        kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send Content-Type: application/json", "type", None)
        with self.load.body() as reserve:
            raw = await body.read(scope, receive, self.rules.max_body, reserve, self.rules.client_timeout)
            batch = await self.reader.read(raw, scope["path"], reserve)
            self.engine.check(batch)
            if self.rules.log_texts:
                print(gate_rules.TEXTS + json.dumps(_logged(batch.texts), ensure_ascii=False), flush=True)
            exchange.texts = batch.count
            with self.load.answer(self._answers.size(batch, self.rules.dimensions)):
                with self.load.admitted(max(batch.count, len(batch.inputs))):
                    status, answer = await self._compute(scope, receive, batch, exchange)
                await self._respond(send, exchange, status, answer)

    async def _compute(self, scope: Scope, receive: Receive, batch: request.Batch, exchange: Exchange) -> tuple[int, bytes]:
        """Status and answer: vectors or scores, those that are not finite computed once more; or vLLM's own refusal."""
        computed = await self.engine.compute(scope, receive, batch)
        raw, answer = computed.raw, computed.answer
        if computed.status != 200:
            assert raw is not None
            return self._failed(scope, computed.status, raw)
        nonfinite = await self.engine.recompute(scope, receive, batch, answer, computed.nonfinite)
        if nonfinite:
            self.metrics.nonfinite.inc(len(nonfinite))
            raise response.refused(batch, nonfinite[0])
        if batch.part_tokens:
            answer = await asyncio.to_thread(long_texts.merged, answer, batch.part_tokens, normalized=self.rules.normalized)
        if raw is None or computed.nonfinite or batch.encoding != "base64" or batch.part_tokens:
            size = self._answers.size(batch, self.rules.dimensions)
            raw = await maybe_threaded(size, self._answers.write, answer, batch)
        assert raw is not None
        exchange.tokens = answer["usage"]["prompt_tokens"]
        self.metrics.texts.inc(batch.count)
        self.metrics.tokens.inc(exchange.tokens)
        return 200, raw

    def _failed(self, scope: Scope, status: int, raw: bytes) -> tuple[int, bytes]:
        """The answer for an error of vLLM's: 503 where a later try may succeed, else vLLM's own."""
        if status >= 500 and self.load.draining:
            raise self.load.stopping()
        if status >= 500 and is_dead(scope):
            raise Refused(
                503, "the engine died; it is being restarted", "engine", None, {"retry-after": str(self.rules.restart_seconds)}
            )
        if status == 503:
            raise self.load.busy("vLLM's queue is full")
        return status, raw


def _logged(inputs: Sequence[str | list[int]]) -> dict[str, Any]:
    """The texts of a request for the log: the first LOGGED_TEXTS, each cut to LOGGED_CHARACTERS."""
    short = [
        item if len(item) <= LOGGED_CHARACTERS else f"{str(item)[:LOGGED_CHARACTERS]}… ({len(item)} in all)"
        for item in inputs[:LOGGED_TEXTS]
    ]
    return {"texts": short} | ({"left_out": len(inputs) - len(short)} if len(inputs) > len(short) else {})


def _check_host(scope: Scope, names: Sequence[str]) -> None:
    """Refuse a request that calls the server by none of `names`, or by several."""
    headers = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"]
    if len(headers) != 1 or not hosts.is_allowed(headers[0], names):
        name = quoted(headers[0]) if headers else "missing"
        raise Refused(421, f"the Host header is {name}, no name of this server; add it with --allowed-host NAME", "host")


def _without_body(send: Send) -> Send:
    """`send` for the answer to HEAD: its headers alone."""

    async def send_headers(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_headers
