"""`qembed top` where there is nothing, or something else, to look at; a real server is looked at in tests/e2e."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from qembed.cli import group
from tests.answering import answering


@pytest.fixture
def something() -> Iterator[str]:
    with answering(lambda asked: (200, b"hello 1\n") if asked.headers["Authorization"] else (401, b"")) as url:
        yield url


def top(*arguments: str, **environment: str) -> tuple[int, str]:
    done = CliRunner().invoke(group, ["top", *arguments, "--once"], env=environment)
    return done.exit_code, done.output


def test_no_server_is_told_in_one_line() -> None:
    code, said = top("http://127.0.0.1:9")
    assert (code, said.count("\n")) == (1, 1)
    assert "no server answers there" in said


def test_a_key_is_asked_for(something: str) -> None:
    code, said = top(something)
    assert code == 2
    assert "--api-key-file or QEMBED_API_KEY" in said


def test_another_server_is_told(something: str) -> None:
    code, said = top(something, QEMBED_API_KEY="long-enough-key")
    assert code == 1
    assert "is no vLLM" in said


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://[::1"])
def test_what_is_no_url_is_told(url: str) -> None:
    code, said = top(url)
    assert code == 2
    assert "not the URL of a server" in said
