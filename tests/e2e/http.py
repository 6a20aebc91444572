"""Raw HTTP requests, including ones that no client library sends."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

EMBEDDINGS = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    raw: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's form."""
        return str(self.json["error"]["message"])

    @property
    def vectors(self) -> list[list[float]]:
        assert self.status == 200, self.raw[:500]
        return [item["embedding"] for item in self.json["data"]]


def send(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 120
) -> Answer:
    """Send a request on a new connection; `url` is the base URL of an openai client."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()})
    finally:
        connection.close()


def embed(url: str, key: str | None = None, timeout: float = 120, **body: Any) -> Answer:
    """Request vectors."""
    headers = {**JSON, **({"Authorization": f"Bearer {key}"} if key else {})}
    return send(url, "POST", EMBEDDINGS, json.dumps(body).encode(), headers, timeout)


def metric(url: str, name: str, key: str | None = None) -> float:
    """The value of the metric `name`, summed over all labels."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    lines = send(url, "GET", "/metrics", headers=headers).raw.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)
