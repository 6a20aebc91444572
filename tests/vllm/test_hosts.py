"""Accepted and refused Host headers."""

from __future__ import annotations

import socket

import pytest

from qembed.errors import BadInput
from qembed.vllm import hosts


@pytest.mark.parametrize(
    "header",
    [
        *("localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "localhost.:80", "localhost:"),
        *("127.0.0.1", "127.0.0.1:8000", "127.1.2.3", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", " localhost "),
    ],
)
def test_loopback_names_are_accepted(header: str) -> None:
    names = hosts.allowed("127.0.0.1", (), has_keys=False)
    assert names is not None
    assert hosts.is_allowed(header, names)


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "evil.example", "evil.example:8000", "localhost.evil.example", "evil.example.localhost", "xlocalhost"),
        *("127.0.0.1.evil.example", "127.0.0.1@evil.example", "evil.example/localhost", "localhost evil.example", "::1"),
        *("localhost,evil.example", "192.0.2.1", "[2001:db8::1]", "localhost:80:80", "localhost:x", "[::1", "::1]:8000", "*"),
        *("any address", "ｌocalhost", "localhost\x00"),
    ],
)
def test_other_names_are_refused(header: str | None) -> None:
    names = hosts.allowed("127.0.0.1", (), has_keys=False)
    assert names is not None
    assert not hosts.is_allowed(header, names)


def test_the_name_that_the_server_listens_on_is_accepted() -> None:
    names = hosts.allowed("Embed.Example.Org.", (), has_keys=False) or []
    assert hosts.is_allowed("embed.example.org:8000", names)
    assert not hosts.is_allowed("other.example.org", names)
    assert hosts.is_allowed("[2001:db8::1]:8000", hosts.allowed("2001:DB8:0::1", (), has_keys=False) or [])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_server_on_all_addresses_accepts_every_address_and_no_name(host: str) -> None:
    names = hosts.allowed(host, (), has_keys=False) or []
    for header in ("192.0.2.1:8000", "[2001:db8::1]", "localhost", f"{socket.gethostname()}:8000"):
        assert hosts.is_allowed(header, names)
    assert not hosts.is_allowed("evil.example", names)


def test_other_names_can_be_added() -> None:
    names = hosts.allowed("127.0.0.1", ("Embed.example.org", "2001:db8::2"), has_keys=False) or []
    for header in ("embed.example.org:443", "EMBED.EXAMPLE.ORG.", "[2001:db8::2]:8000", "localhost"):
        assert hosts.is_allowed(header, names)
    assert not hosts.is_allowed("evil.example", names)
    assert hosts.allowed("127.0.0.1", ("a", "*"), has_keys=False) is None


def test_with_keys_any_name_is_accepted_unless_some_are_listed() -> None:
    assert hosts.allowed("0.0.0.0", (), has_keys=True) is None
    names = hosts.allowed("127.0.0.1", ("a.example",), has_keys=True) or []
    assert hosts.is_allowed("a.example", names)
    assert not hosts.is_allowed("b.example", names)


@pytest.mark.parametrize("name", ["", "http://a.example", "a b", "a.example/x", "[::1", "user@a"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="--allowed-host"):
        hosts.allowed("127.0.0.1", (name,), has_keys=False)
