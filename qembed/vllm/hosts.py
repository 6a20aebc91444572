"""The names by which a request may call the server (its Host header), against DNS rebinding.

A web page can point its own name at 127.0.0.1. The browser then takes the server for a part of that page, and lets it read the
answers. But such a request still calls the server by the page's name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from qembed.errors import BadInput

ANY = "*"
ANY_ADDRESS = "any address"
"""Means every IP address, for a server that listens on all addresses. A web page cannot rebind an address."""
LOOPBACK = "localhost"
"""Means the loopback addresses, too."""
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::\d{0,5})?", re.ASCII | re.IGNORECASE)


def allowed(host: str, extra: Sequence[str], *, has_keys: bool) -> list[str] | None:
    """The names for a server that listens on `host`; None: any name.

    `extra` are the names of --allowed-host. Without them, a server with keys takes any name: a page does not have its key.

    Raises:
        BadInput: one of `extra` is no name.
    """
    names = [_checked(name) for name in extra]
    if ANY in names or (has_keys and not names):
        return None
    own = [ANY_ADDRESS, normal(socket.gethostname())] if host in WILDCARDS else [normal(host.strip("[]"))]
    return list(dict.fromkeys([LOOPBACK, *own, *names]))


def is_allowed(header: str | None, names: Sequence[str]) -> bool:
    """Whether the Host header `header`, with or without a port, has one of `names`."""
    match = HOST.fullmatch((header or "").strip())
    if match is None:
        return False
    name = normal(match[1].strip("[]"))
    if name in names:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return ANY_ADDRESS in names or (LOOPBACK in names and address.is_loopback)


def normal(name: str) -> str:
    """`name` in lower case without a final dot; an IPv6 address in its shortest form."""
    name = name.lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _checked(name: str) -> str:
    if name == ANY:
        return name
    match = HOST.fullmatch(name if name.count(":") < 2 or name.startswith("[") else f"[{name}]")
    if match is None:
        raise BadInput(f"--allowed-host {name!r}: give a name or address alone, such as embed.example.org, or * for any")
    return normal(match[1].strip("[]"))
