"""TCP ports: whether one can be had, and which is free."""

from __future__ import annotations

import errno
import socket

from qembed.errors import BadInput, QembedError


def check(host: str, port: int) -> None:
    """See that `port` of `host` can be bound.

    Raises:
        BadInput: `host` is no address of this machine, or we may not use that port.
        QembedError: something else listens there.
    """
    try:
        with _bound(host, port):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise QembedError(f"port {port} of {host} is taken; choose another with --port") from error
        raise BadInput(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error


def free(host: str) -> int:
    """A port of `host` that nothing listens on now.

    Raises:
        BadInput: `host` is no address of this machine.
    """
    try:
        with _bound(host, 0) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise BadInput(f"{host} cannot be listened on: {error.strerror or error}") from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
