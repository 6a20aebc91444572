"""Reading bodies: large ones in a separate process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint.find import SAMPLE, find
from qembed.serve.gate import reader as reader_module
from qembed.serve.gate import request
from qembed.serve.gate.errors import Refused
from qembed.serve.gate.reader import PROCESS_BYTES, Reader
from qembed.serve.gate.request import Batch
from qembed.vllm.gate_rules import Rules

RULES = Rules(folder="", max_model_len=100, dimensions=[4], prompts={"query": "Q: "}, keys={"hash": "name"})
TEXTS = [f"Zu\u0308rich\u200b number {number}" for number in range(2000)]
LARGE = {"input": TEXTS, "prompt_name": "query", "user": "x" * 1000, "more": "x" * PROCESS_BYTES}


@pytest.fixture(autouse=True)
def _process_is_ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    readers: list[Reader] = []
    original = Reader.__init__

    def init(self: Reader, rules: Rules) -> None:
        original(self, rules)
        readers.append(self)

    monkeypatch.setattr(Reader, "__init__", init)
    yield
    for reader in readers:
        reader._end()


def read(reader: Reader, body: Any) -> Batch:
    return asyncio.run(reader.read(body if isinstance(body, bytes) else json.dumps(body).encode()))


def test_a_large_body_is_read_in_another_process_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = request.read(json.dumps(LARGE).encode(), RULES, len)
    monkeypatch.setattr(request, "read", lambda *_: pytest.fail("read here"))
    reader = Reader(RULES)
    for _ in range(2):
        assert read(reader, LARGE) == expected
    assert expected.inputs[0] == "Q: Zürich number 0"


def test_a_small_body_needs_no_process() -> None:
    reader = Reader(RULES)
    assert read(reader, {"input": "x" * (PROCESS_BYTES // 2), "truncate_prompt_tokens": 5}).inputs
    assert reader._process is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"input": [*TEXTS, ""], "more": "x" * PROCESS_BYTES}, 400),
        ({"input": "x", "model": "x" * PROCESS_BYTES}, 404),
        (b"[" * 2 * PROCESS_BYTES, 400),
        (b"\xff" * 2 * PROCESS_BYTES, 400),
    ],
)
def test_errors_of_a_large_body_are_those_of_a_small_one(body: Any, status: int) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as expected:
        request.read(raw, RULES, len)
    reader = Reader(RULES)
    with pytest.raises(Refused) as caught:
        read(reader, raw)
    assert caught.value.body() == expected.value.body()
    assert (caught.value.status, caught.value.reason) == (status, expected.value.reason)
    assert read(reader, LARGE).inputs


def test_a_killed_process_is_restarted() -> None:
    reader = Reader(RULES)
    read(reader, LARGE)
    assert reader._process is not None
    os.kill(reader._process.pid, signal.SIGKILL)
    assert len(read(reader, LARGE).inputs) == len(TEXTS)


def test_a_process_that_ends_while_reading_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reader_module._read
    ended: list[bool] = []

    def fail_once(file: Any) -> bytes:
        if not ended:
            ended.append(True)
            raise EOFError
        return original(file)

    monkeypatch.setattr(reader_module, "_read", fail_once)
    assert len(read(Reader(RULES), LARGE).inputs) == len(TEXTS)
    assert ended


def test_concurrent_large_bodies_get_their_own_texts() -> None:
    async def at_once() -> list[Batch]:
        reader = Reader(RULES)
        await reader.read(json.dumps(LARGE).encode())
        bodies = [json.dumps({**LARGE, "input": [f"text {number}"]}).encode() for number in range(8)]
        return await asyncio.gather(*map(reader.read, bodies))

    assert [batch.inputs for batch in asyncio.run(at_once())] == [[f"Q: text {number}"] for number in range(8)]


def test_the_process_is_the_first_to_be_killed_when_memory_runs_out() -> None:
    reader = Reader(RULES)
    read(reader, LARGE)
    assert reader._process is not None
    assert Path(f"/proc/{reader._process.pid}/oom_score_adj").read_text() == "1000\n"


def test_a_large_body_with_a_token_that_the_model_lacks_is_refused() -> None:
    reader = Reader(RULES)
    reader._token_beyond = lambda text: "[CUST]" if "[CUST]" in text else None
    with pytest.raises(Refused, match=r"input\[1\] holds the token"):
        read(reader, {**LARGE, "input": ["fine", "to [CUST]"]})


def test_a_body_that_cannot_be_read_twice_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_read", lambda _: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(EOFError))
    with pytest.raises(Refused) as caught:
        read(Reader(RULES), LARGE)
    assert caught.value.status == 503
    assert int(caught.value.headers["retry-after"]) >= 1


def test_a_body_that_takes_too_long_is_refused_and_the_next_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(RULES)
    read(reader, LARGE)
    assert reader._process is not None
    os.kill(reader._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(reader_module, "SECONDS", 0.2)
    with pytest.raises(Refused, match="takes longer than") as caught:
        read(reader, LARGE)
    assert caught.value.status == 400
    assert reader._process is None  # the body was not read again
    monkeypatch.setattr(reader_module, "SECONDS", 60)
    assert read(reader, LARGE).inputs


def test_the_process_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    original = reader_module._write
    monkeypatch.setattr(reader_module, "_write", lambda file, content: (written.append(content), original(file, content)))
    reader = Reader(replace(RULES, keys={"a-hash-of-a-key": "name"}))
    read(reader, LARGE)
    assert reader._process is not None
    assert len(written) == 2  # the rules, the body
    assert not any(b"a-hash-of-a-key" in content for content in written)
    for file in ("cmdline", "environ"):
        assert b"a-hash-of-a-key" not in Path(f"/proc/{reader._process.pid}/{file}").read_bytes()


def test_the_folder_may_be_moved_while_it_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(find(SAMPLE).folder, folder)
    reader = Reader(replace(RULES, folder=str(folder)))
    folder.rename(tmp_path / "moved")
    for size in (50, 150, PROCESS_BYTES):
        text = "a" * size  # some tokens for many characters
        if size < RULES.max_model_len:
            assert read(reader, {"input": text}).inputs == [text]
        else:
            with pytest.raises(Refused, match=r"input\[1\] has .* tokens"):
                read(reader, {"input": ["fine", "word " * size]})
