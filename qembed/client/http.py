"""One HTTP request, by the standard library."""

from __future__ import annotations

import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from qembed.client.deadline import within

STEP = 2**16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Returns redirects as answers: following one could send a key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def request(
    url: str,
    *,
    method: str = "GET",
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float,
    largest: int | None = None,
    own: bool = False,
) -> tuple[int, bytes]:
    """The status and the body of the answer, for every status.

    Args:
        url: http or https, with the path.
        method: of the request.
        body: JSON.
        headers: further ones.
        timeout: seconds for the head of the answer, with the connection, and for its body.
        largest: bytes of the answer that are read, at most.
        own: the server is one that we started on this machine: no proxy, and its certificate is for another name.

    Raises:
        ValueError: `url` is not a URL.
        OSError, http.client.HTTPException: nothing answers there, or not in HTTP.
    """
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if own:
        handlers.append(urllib.request.ProxyHandler({}))
        if url.startswith("https:"):
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            handlers.append(urllib.request.HTTPSHandler(context=context))
    content = {"Content-Type": "application/json"} if body is not None else {}
    data = None if body is None else body.encode()
    request = urllib.request.Request(url, data, {**content, **(headers or {})}, method=method)
    try:
        opener = urllib.request.build_opener(*handlers)
        with within(timeout, lambda: opener.open(request, timeout=timeout)) as answer:
            return int(answer.status), _body(answer, largest, timeout)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _body(error, largest, timeout)


def _body(answer: Any, largest: int | None, seconds: float) -> bytes:
    """The body of an answer, at most `largest` bytes. A server that sends a byte now and then does not hold us for ever.

    Raises:
        TimeoutError: it takes longer than `seconds`.
    """
    deadline, body = time.monotonic() + seconds, bytearray()
    while largest is None or len(body) < largest:
        part = answer.read1(STEP if largest is None else min(STEP, largest - len(body)))
        if not part:
            break
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer within {seconds:g} s")
    return bytes(body)
