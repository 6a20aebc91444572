"""Running servers as the engine: batches are spread, retried when a server fails, and single texts rejected."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qembed.cli import group
from qembed.embed import servers
from tests.answering import Request, Server

from .conftest import rejects
from .fake_engine import vector


class FakeServer(Server):
    """An OpenAI-compatible server: `trouble` are the statuses of its next answers, `requested_texts` the texts of its requests.

    With `qembed` it has the metric by which `qembed serve` describes itself. With `key` it answers no request without it.
    """

    def __init__(self, model: str = "fake", dimensions: int = 16, qembed: bool = False, key: str | None = None) -> None:
        self.model, self.dimensions, self.qembed, self.key = model, dimensions, qembed, key
        self.trouble: list[int] = []
        self.requested_texts: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        super().__init__(self.answer)

    def answer(self, request: Request) -> tuple[int, object]:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key"}}
        if request.path == "/metrics":
            return 200, b'qembed_serving{weights="int4",dtype="float32"} 1\n' if self.qembed else b""
        if request.path == "/version":
            return 200, b'{"version": "1", "qembed": "1", "default_prompt": "query"}' if self.qembed else b"{}"
        if not request.body:
            return 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        texts = request.body["input"]
        self.requested_texts.append(texts)
        self.bodies.append(request.body)
        if self.trouble and texts != [servers.PROBE]:
            return self.trouble.pop(0), {"error": {"message": "trouble"}}
        long = [place for place, text in enumerate(texts) if len(text) > 300]
        if long:
            return 400, {"error": {"message": f"input[{long[0]}] is too long"}}
        if any("poison" in text for text in texts):
            return 500, {"error": {"message": "it broke"}}
        size = request.body.get("dimensions") or self.dimensions
        encoded = [base64.b64encode(vector([len(text), ord(text[0])], size).tobytes()).decode() for text in texts]
        data = [{"object": "embedding", "index": n, "embedding": vector_text} for n, vector_text in enumerate(encoded)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return 200, {"object": "list", "model": self.model, "usage": usage, "data": data}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeServer]]:
    monkeypatch.setattr(servers, "PAUSES", (0.01, 0.05))
    both_servers = [FakeServer(), FakeServer()]
    yield both_servers
    for fake in both_servers:
        fake.end()


def embed(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["embed", *map(str, arguments)])


def vectors(texts: list[str], dimensions: int = 16) -> np.ndarray[Any, Any]:
    return np.stack([vector([len(text), ord(text[0])], dimensions) for text in texts])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{'word ' * (n % 40)}text {n}\n" for n in range(1000)))
    return path


def test_batches_are_spread_and_the_output_is_in_input_order(fakes: list[FakeServer], source: Path, tmp_path: Path) -> None:
    fakes[0].trouble = [503, 503, 429, 502]
    result = embed(source, "-o", tmp_path / "out.npy", "--url", fakes[0].url, "--url", fakes[1].url + "/v1/")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(source.read_text().splitlines()))
    assert all(len(fake.requested_texts) > 4 for fake in fakes)


def test_batches_of_a_stopped_server_go_to_the_other(fakes: list[FakeServer], source: Path, tmp_path: Path) -> None:
    original = servers._request

    def request(engine: servers.Servers, server: servers.Server, texts: list[str], last: bool = False) -> list[Any]:
        if server.url == fakes[0].url and len(fakes[0].requested_texts) == 3:
            fakes[0].end()
        return original(engine, server, texts, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "_request", request)
        result = embed(source, "-o", tmp_path / "out.npy", "--url", fakes[0].url, "--url", fakes[1].url)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(source.read_text().splitlines()))


def test_only_texts_that_a_server_rejects_or_fails_on_are_rejected(
    fakes: list[FakeServer], source: Path, tmp_path: Path
) -> None:
    texts = source.read_text().splitlines()
    texts[17], texts[900] = "x" * 400, "poison"
    source.write_text("\n".join(texts))
    result = embed(source, "-o", tmp_path / "out.npy", "--url", fakes[0].url, "--dimensions", "8")
    assert result.exit_code == 4, result.output
    rejected = rejects(tmp_path / "out.rejects.jsonl")
    assert [(reject["id"], reject["reason"]) for reject in rejected] == [("18", "input[0] is too long"), ("901", "it broke")]
    accepted = [text for place, text in enumerate(texts) if place not in (17, 900)]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(accepted, 8))


def test_without_an_answering_server_the_run_ends_and_can_be_resumed(
    fakes: list[FakeServer], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qembed.embed import windows

    monkeypatch.setattr(servers, "PATIENCE", 0.3)
    monkeypatch.setattr(windows, "ROWS", 200)
    out = tmp_path / "out.npy"
    original = servers._request
    count = 0

    def request(engine: servers.Servers, server: servers.Server, texts: list[str], last: bool = False) -> list[Any]:
        nonlocal count
        count += 1
        if count > 12:
            raise servers._Busy("no answer")
        return original(engine, server, texts, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "_request", request)
        result = embed(source, "-o", out, "--url", fakes[0].url, "--url", fakes[1].url)
    assert result.exit_code == 1
    assert "no server has answered" in result.stderr
    resumed = embed(source, "-o", out, "--url", fakes[0].url, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["resumed"] >= 200
    np.testing.assert_array_equal(np.load(out), vectors(source.read_text().splitlines()))


def test_servers_of_different_models_are_refused(tmp_path: Path, source: Path) -> None:
    first, second, shorter = FakeServer(), FakeServer("other"), FakeServer(dimensions=8)
    out = tmp_path / "out.npy"
    for urls, words in (
        ([first.url, second.url], "different models"),
        ([first.url, shorter.url], "differ in length"),
        (["http://127.0.0.1:9"], "nothing answers there"),
        (["nonsense"], "not the URL of a server"),
    ):
        result = embed(source, "-o", out, *(word for url in urls for word in ("--url", url)))
        assert result.exit_code == 2, result.output
        assert words in result.stderr
    assert not list(tmp_path.glob(".out*"))
    for server in (first, second, shorter):
        server.end()


@pytest.mark.parametrize(
    "vectors",
    [
        lambda count: [[1.0] * 16] * (count - 1),
        lambda count: [[1.0] * 16] * (count - 1) + [[1.0] * 15],
        lambda count: [["x"] * 16] * count,
        lambda count: [[1.0] * 8] * count,
        lambda count: [None] * count,
    ],
)
def test_answers_without_vectors_end_the_run(source: Path, tmp_path: Path, vectors: Any) -> None:
    def answer(request: Request) -> tuple[int, object]:
        if not request.body:
            return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
        texts = request.body["input"]
        rows = [[1.0] * 16] if texts == [servers.PROBE] else vectors(len(texts))
        data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}

    server = Server(answer)
    result = embed(source, "-o", tmp_path / "out.npy", "--url", server.url)
    server.end()
    assert result.exit_code == 1, result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("qembed: ")]) == 1
    assert "unexpected" not in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_texts_whose_vector_is_not_finite_or_zero_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("good\nnan\nzero\n")

    def answer(request: Request) -> tuple[int, object]:
        if not request.body:
            return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
        unusable = {"nan": [float("nan")] * 16, "zero": [0.0] * 16}
        rows = [np.array(unusable.get(text, [1.0] * 16), "<f4") for text in request.body["input"]]
        data = [
            {"object": "embedding", "index": n, "embedding": base64.b64encode(row.tobytes()).decode()}
            for n, row in enumerate(rows)
        ]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}

    server = Server(answer)
    result = embed(path, "-o", tmp_path / "out.npy", "--url", server.url)
    server.end()
    assert result.exit_code == 4, result.output
    assert [row["id"] for row in rejects(tmp_path / "out.rejects.jsonl")] == ["2", "3"]
    assert np.load(tmp_path / "out.npy").shape == (1, 16)


def test_requests_to_qembed_serve_turn_its_default_prompt_off(source: Path, tmp_path: Path) -> None:
    for is_qembed in (True, False):
        server = FakeServer("Qwen3-Embedding-0.6B", qembed=is_qembed)
        result = embed(source, "-o", tmp_path / f"{is_qembed}.npy", "--url", server.url, "--prompt", "query")
        server.end()
        assert result.exit_code == 0, result.output
        assert {body.get("prompt_name") for body in server.bodies} == ({""} if is_qembed else {None})


def test_the_key_is_read_from_a_file(source: Path, tmp_path: Path) -> None:
    server = FakeServer(key="a-long-enough-key")
    out, keys = tmp_path / "out.npy", tmp_path / "keys"
    keys.write_text("# of the team\na-long-enough-key\n")
    assert embed(source, "-o", out, "--url", server.url).exit_code == 2
    assert embed(source, "-o", out, "--url", server.url, "--api-key-file", keys).exit_code == 0
    keys = keys.rename(tmp_path / "keys.jsonl")
    for arguments in (["-o", keys], ["-o", out, "--rejects", keys]):
        refused = embed(source, *arguments, "--force", "--url", server.url, "--api-key-file", keys)
        assert (refused.exit_code, "is the input" in refused.stderr) == (2, True)
    server.end()
    assert "a-long-enough-key" in keys.read_text()
    refused = embed(source, "-o", tmp_path / "x.npy", "--model", "sample", "--api-key-file", keys)
    assert refused.exit_code == 2
    assert "--url" in refused.stderr
