"""Opening the TCP port that a server listens on."""

from __future__ import annotations

import errno
import socket

from qembed.errors import BadInput, QembedError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `port` of `host`; port 0 means a free one.

    Raises:
        BadInput: `host` is not an address of this machine, or the port needs privileges.
        QembedError: another process listens there.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise QembedError(f"port {port} of {host} is taken; choose another with --port") from error
        address = f"{host}:{port}" if port else host
        raise BadInput(f"cannot listen on {address}: {error.strerror or error}") from error


def free(host: str) -> int:
    """A port of `host` that is free now.

    Raises:
        BadInput: `host` is not an address of this machine.
    """
    with listen(host, 0) as listener:
        return int(listener.getsockname()[1])


def _bound(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
