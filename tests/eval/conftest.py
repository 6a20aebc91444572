"""A fake embedding server, and a cache folder per test."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qembed.eval.embedding import SENTINEL
from tests.answering import Request, answering

SERVED = "Qwen3-Embedding-fake"
"""The model's name: prompts of Qwen3-Embedding are known without its folder."""
OPENAI_FIELDS = ("model", "input", "encoding_format", "dimensions")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new cache for each test, so that tests neither touch the user's cache nor share vectors."""
    monkeypatch.setenv("QEMBED_EVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeServer:
    """An OpenAI-compatible embedding server whose vectors depend only on the text; it records its requests."""

    def __init__(self) -> None:
        self.dimension = 64
        self.limit: int | None = None
        self.noise = 0.0
        self.version: dict[str, str] = {}  # fields of /version in addition to vLLM's
        self.fields: set[str] = set()  # of requests, in addition to OpenAI's
        self.inputs: list[str] = []  # without the sentence by which `qembed eval` recognizes a server
        self.dies_after: int | None = None
        self.vectors_by_text: dict[str, list[float]] = {}
        self.refusal: int | None = None
        self.key: str | None = None
        self.about: dict[str, str] | None = None  # by which `qembed serve` describes itself in /metrics
        self.url = ""

    def vector(self, text: str) -> list[float]:
        if text in self.vectors_by_text:
            return self.vectors_by_text[text]
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(digest).normal(size=self.dimension)
        vector += self.noise * np.random.default_rng(digest + 1).normal(size=self.dimension)
        return [float(value) for value in vector / np.linalg.norm(vector)]

    def reply(self, request: Request) -> tuple[int, object]:
        if not request.body:
            if self.key is not None and request.headers["Authorization"] != f"Bearer {self.key}":
                return 401, {}
            if self.about is not None and request.path == "/metrics":
                labels = ",".join(f'{name}="{value}"' for name, value in self.about.items())
                return 200, f"qembed_serving{{{labels}}} 1.0\nqembed_memory_bytes 1.2345e+09\n".encode()
            if (self.about is not None or self.version) and request.path == "/version":
                return 200, {"version": "9.9", **self.version}
        return self.answer(request.path, request.body)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            limit = {} if self.limit is None else {"max_model_len": self.limit}
            return 200, {"object": "list", "data": [{"id": SERVED, "object": "model", "created": 0, "owned_by": "x", **limit}]}
        if path != "/v1/embeddings":
            return 404, {"error": {"message": "no such path"}}
        if self.refusal is not None:
            return self.refusal, {"error": {"message": "the engine is dead", "type": "x", "code": self.refusal}}
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if self.dies_after is not None and len(self.inputs) >= self.dies_after:
            return 500, {"error": {"message": "the engine is dead", "type": "x", "code": 500}}
        self.fields |= {f"{name}={value}" for name, value in body.items() if name not in OPENAI_FIELDS}
        self.inputs += [text for text in texts if text != SENTINEL]
        data = []
        for index, text in enumerate(texts):
            vector: Any = self.vector(text)
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        return 200, {"object": "list", "model": SERVED, "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


@pytest.fixture
def start_server() -> Iterator[Callable[[], FakeServer]]:
    """A function that starts a fake server."""
    with ExitStack() as running:

        def start() -> FakeServer:
            fake = FakeServer()
            fake.url = running.enter_context(answering(fake.reply))
            return fake

        yield start
