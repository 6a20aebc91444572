"""The openai client for servers that are not trusted: their answers are bounded in size and in time."""

from __future__ import annotations

import time
from typing import Any

import openai

from qembed.client.deadline import within
from qembed.client.embeddings import base, key

LARGEST_ANSWER = 2**25
"""Bytes: 64 vectors of 16,384 numbers in decimal, which is the longest way to write them."""


class UnreadableAnswer(openai.OpenAIError):
    """An answer is too large, or compressed; the message says which. Openai 3 passes it on, openai 2 wraps it."""


class BoundedClient(openai.DefaultHttpxClient):
    """Reads answers of at most LARGEST_ANSWER bytes, as long as they come within the time that a request may take.

    They are not decompressed: a few bytes can stand for gigabytes, and vectors hardly shrink. Redirects are answers: following
    one would send the texts to another host.
    """

    def __init__(self) -> None:
        super().__init__(follow_redirects=False)

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The answer, read to its end. Requests and answers are of httpx or httpx2, by the version of openai.

        Raises:
            UnreadableAnswer: it is too large or compressed.
            openai.APITimeoutError: it takes longer than one step of the request may; httpx itself only limits each step.
        """
        seconds = (request.extensions.get("timeout") or {}).get("read")
        deadline = None if seconds is None else time.monotonic() + seconds
        request.headers["Accept-Encoding"] = "identity"
        send = super().send
        try:
            answer = within(seconds, lambda: send(request, stream=True, **options))
        except TimeoutError as error:
            raise openai.APITimeoutError(request) from error
        if stream:
            return answer
        try:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UnreadableAnswer("its answer is compressed, which was not asked for")
            body = bytearray()
            for part in answer.iter_raw():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise UnreadableAnswer(f"its answer is larger than {LARGEST_ANSWER >> 20} MiB")
                if deadline is not None and time.monotonic() > deadline:
                    raise openai.APITimeoutError(request)
        finally:
            answer.close()
        headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() != "transfer-encoding"]
        return type(answer)(
            answer.status_code, headers=headers, content=bytes(body), request=request, extensions=answer.extensions
        )


def client(url: str, api_key: str | None, timeout: float, **options: Any) -> openai.OpenAI:
    """A client of the server at `url`. `api_key` None: the one in the environment; `timeout`: seconds for an answer."""
    return openai.OpenAI(
        base_url=base(url) + "/v1", api_key=api_key or key(), timeout=timeout, http_client=BoundedClient(), **options
    )


def unreadable(error: BaseException) -> str | None:
    """Why an answer was not read to its end; None if that is not what `error` is about."""
    return next((str(cause) for cause in (error, error.__cause__) if isinstance(cause, UnreadableAnswer)), None)
