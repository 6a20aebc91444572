"""Errors of the gate: an HTTP status and a body in OpenAI's format."""

from __future__ import annotations

import json
from typing import Any

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    421: "MisdirectedRequestError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class Refused(Exception):
    """The gate refuses a request.

    Attributes:
        status: the HTTP status.
        message: what is wrong, and what to do about it.
        reason: one word, the label `reason` in /metrics.
        param: the field of the request that is wrong, if it is one.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, reason: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.param = status, message, reason, param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON body of the answer."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": TYPES.get(self.status, "Error"),
            "param": self.param,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()


def bad(message: str, reason: str, param: str | None = "input") -> Refused:
    """An invalid request: status 400."""
    return Refused(400, message, reason, param)


def quoted(value: Any) -> str:
    """`value` as JSON of at most 60 characters, for a message."""
    try:
        text = json.dumps(value[:61] if isinstance(value, str) else value, ensure_ascii=True)
    except (ValueError, RecursionError):
        return "something else"
    return text if len(text) <= 60 else text[:60] + "…"
