"""Through running servers: spread over them, asked again where one fails, single texts told apart that a server refuses."""

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
from tests.answering import Asked, Server

from .conftest import rejects
from .fake_engine import vector


class Fake(Server):
    """An OpenAI-compatible server: `trouble` are the statuses of its next answers, `asked` the texts that it was sent.

    With `qembed` it has the metric by which `qembed serve` describes itself. With `key` it answers no request without it.
    """

    def __init__(self, model: str = "fake", dimensions: int = 16, qembed: bool = False, key: str | None = None) -> None:
        self.model, self.dimensions, self.qembed, self.key = model, dimensions, qembed, key
        self.trouble: list[int] = []
        self.asked: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        super().__init__(self.answer)

    def answer(self, asked: Asked) -> tuple[int, object]:
        if self.key and asked.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key"}}
        if asked.path == "/metrics":
            return 200, b'qembed_serving{weights="int4",dtype="float32"} 1\n' if self.qembed else b""
        if asked.path == "/version":
            return 200, b'{"version": "1", "qembed": "1", "default_prompt": "query"}' if self.qembed else b"{}"
        if not asked.body:
            return 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        texts = asked.body["input"]
        self.asked.append(texts)
        self.bodies.append(asked.body)
        if self.trouble and texts != [servers.PROBE]:
            return self.trouble.pop(0), {"error": {"message": "trouble"}}
        long = [place for place, text in enumerate(texts) if len(text) > 300]
        if long:
            return 400, {"error": {"message": f"input[{long[0]}] is too long"}}
        if any("poison" in text for text in texts):
            return 500, {"error": {"message": "it broke"}}
        size = asked.body.get("dimensions") or self.dimensions
        encoded = [base64.b64encode(vector([len(text), ord(text[0])], size).tobytes()).decode() for text in texts]
        data = [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(encoded)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return 200, {"object": "list", "model": self.model, "usage": usage, "data": data}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    monkeypatch.setattr(servers, "PAUSES", (0.01, 0.05))
    both = [Fake(), Fake()]
    yield both
    for one in both:
        one.end()


def embed(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["embed", *map(str, arguments)])


def made(texts: list[str], dimensions: int = 16) -> np.ndarray[Any, Any]:
    return np.stack([vector([len(text), ord(text[0])], dimensions) for text in texts])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{'word ' * (n % 40)}text {n}\n" for n in range(1000)))
    return path


def test_the_work_is_spread_and_the_order_is_that_of_the_input(two: list[Fake], source: Path, tmp_path: Path) -> None:
    two[0].trouble = [503, 503, 429, 502]
    done = embed(source, "-o", tmp_path / "out.npy", "--url", two[0].url, "--url", two[1].url + "/v1/")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), made(source.read_text().splitlines()))
    assert all(len(one.asked) > 4 for one in two)


def test_a_server_that_goes_away_leaves_its_work_to_the_other(two: list[Fake], source: Path, tmp_path: Path) -> None:
    opened = servers._ask

    def ask(all_of_them: servers.Servers, server: servers.Server, texts: list[str], last: bool = False) -> list[Any]:
        if server.url == two[0].url and len(two[0].asked) == 3:
            two[0].end()
        return opened(all_of_them, server, texts, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "_ask", ask)
        done = embed(source, "-o", tmp_path / "out.npy", "--url", two[0].url, "--url", two[1].url)
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), made(source.read_text().splitlines()))


def test_texts_that_a_server_refuses_or_breaks_on_are_rejected_alone(two: list[Fake], source: Path, tmp_path: Path) -> None:
    texts = source.read_text().splitlines()
    texts[17], texts[900] = "x" * 400, "poison"
    source.write_text("\n".join(texts))
    done = embed(source, "-o", tmp_path / "out.npy", "--url", two[0].url, "--dimensions", "8")
    assert done.exit_code == 4, done.output
    told = rejects(tmp_path / "out.rejects.jsonl")
    assert [(one["id"], one["reason"]) for one in told] == [("18", "input[0] is too long"), ("901", "it broke")]
    left = [text for place, text in enumerate(texts) if place not in (17, 900)]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), made(left, 8))


def test_no_server_ends_the_run_and_what_is_finished_is_kept(
    two: list[Fake], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qembed.embed import windows

    monkeypatch.setattr(servers, "PATIENCE", 0.3)
    monkeypatch.setattr(windows, "ROWS", 200)
    out = tmp_path / "out.npy"
    for one in two:
        one.trouble = [200] * 0
    real = servers._ask
    count = 0

    def ask(all_of_them: servers.Servers, server: servers.Server, texts: list[str], last: bool = False) -> list[Any]:
        nonlocal count
        count += 1
        if count > 12:
            raise servers._Busy("no answer")
        return real(all_of_them, server, texts, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "_ask", ask)
        done = embed(source, "-o", out, "--url", two[0].url, "--url", two[1].url)
    assert done.exit_code == 1
    assert "no server has answered" in done.stderr
    again = embed(source, "-o", out, "--url", two[0].url, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["resumed"] >= 200
    np.testing.assert_array_equal(np.load(out), made(source.read_text().splitlines()))


def test_servers_that_do_not_belong_together(tmp_path: Path, source: Path) -> None:
    one, other, short = Fake(), Fake("other"), Fake(dimensions=8)
    out = tmp_path / "out.npy"
    for urls, words in (
        ([one.url, other.url], "different models"),
        ([one.url, short.url], "differ in length"),
        (["http://127.0.0.1:9"], "nothing answers there"),
        (["nonsense"], "not the URL of a server"),
    ):
        done = embed(source, "-o", out, *(word for url in urls for word in ("--url", url)))
        assert done.exit_code == 2, done.output
        assert words in done.stderr
    assert not list(tmp_path.glob(".out*"))
    for server in (one, other, short):
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
def test_answers_that_are_no_vectors_end_the_run(source: Path, tmp_path: Path, vectors: Any) -> None:
    def answer(asked: Asked) -> tuple[int, object]:
        if not asked.body:
            return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
        texts = asked.body["input"]
        rows = [[1.0] * 16] if texts == [servers.PROBE] else vectors(len(texts))
        data = [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(rows)]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}

    server = Server(answer)
    done = embed(source, "-o", tmp_path / "out.npy", "--url", server.url)
    server.end()
    assert done.exit_code == 1, done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("qembed: ")]) == 1
    assert "unexpected" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_texts_whose_vector_is_not_finite_or_zero_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("good\nnan\nzero\n")

    def answer(asked: Asked) -> tuple[int, object]:
        if not asked.body:
            return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
        made = {"nan": [float("nan")] * 16, "zero": [0.0] * 16}
        rows = [np.array(made.get(text, [1.0] * 16), "<f4") for text in asked.body["input"]]
        data = [
            {"object": "embedding", "index": n, "embedding": base64.b64encode(one.tobytes()).decode()}
            for n, one in enumerate(rows)
        ]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}

    server = Server(answer)
    done = embed(path, "-o", tmp_path / "out.npy", "--url", server.url)
    server.end()
    assert done.exit_code == 4, done.output
    assert [one["id"] for one in rejects(tmp_path / "out.rejects.jsonl")] == ["2", "3"]
    assert np.load(tmp_path / "out.npy").shape == (1, 16)


def test_a_qembed_server_is_told_to_put_no_prompt_of_its_own_before_texts(source: Path, tmp_path: Path) -> None:
    for is_qembed in (True, False):
        server = Fake(qembed=is_qembed)
        done = embed(source, "-o", tmp_path / f"{is_qembed}.npy", "--url", server.url, "--prompt", "query")
        server.end()
        assert done.exit_code == 0, done.output
        assert {body.get("prompt_name") for body in server.bodies} == ({""} if is_qembed else {None})


def test_the_key_is_read_from_a_file(source: Path, tmp_path: Path) -> None:
    server = Fake(key="a-long-enough-key")
    out, keys = tmp_path / "out.npy", tmp_path / "keys"
    keys.write_text("# of the team\na-long-enough-key\n")
    assert embed(source, "-o", out, "--url", server.url).exit_code == 2
    assert embed(source, "-o", out, "--url", server.url, "--api-key-file", keys).exit_code == 0
    server.end()
    refused = embed(source, "-o", tmp_path / "x.npy", "--model", "sample", "--api-key-file", keys)
    assert refused.exit_code == 2
    assert "--url" in refused.stderr
