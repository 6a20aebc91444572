"""Errors of `qembed top`. tests/e2e runs it on a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from qembed.cli import group
from tests.answering import answering


@pytest.fixture
def other_server() -> Iterator[str]:
    """A server with /metrics that is not vLLM, and that requires a key."""
    with answering(lambda request: (200, b"hello 1\n") if request.headers["Authorization"] else (401, b"")) as url:
        yield url


def top(*arguments: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["top", *arguments, "--once"], env=environment)
    return result.exit_code, result.output


def test_no_server_is_reported_in_one_line() -> None:
    code, output = top("http://127.0.0.1:9")
    assert (code, output.count("\n")) == (1, 1)
    assert "no server answers there" in output


def test_a_missing_key_is_reported(other_server: str) -> None:
    code, output = top(other_server)
    assert code == 2
    assert "--api-key-file or QEMBED_API_KEY" in output


def test_a_server_that_is_not_vllm_is_reported(other_server: str) -> None:
    code, output = top(other_server, QEMBED_API_KEY="long-enough-key")
    assert code == 1
    assert "not vLLM" in output


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://[::1"])
def test_an_invalid_url_is_reported(url: str) -> None:
    code, output = top(url)
    assert code == 2
    assert "not the URL of a server" in output
