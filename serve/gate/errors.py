"""What is answered in place of vectors: a status, and a body in OpenAI's form."""

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
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class Refused(Exception):
    """A request that gets no vectors.

    Attributes:
        status: the HTTP status.
        message: what is wrong, and what to do.
        reason: a word for it, a label in /metrics.
        param: the field of the request that it is about.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, reason: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.param = status, message, reason, param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON body."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": TYPES.get(self.status, "Error"),
            "param": self.param,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()


def bad(message: str, reason: str, param: str | None = "input") -> Refused:
    """A request that is wrong: status 400."""
    return Refused(400, message, reason, param)
