"""What a running server tells of itself: its model, its version, and, if it is a `qembed serve`, what it computes in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPException

from qembed.client import http

ASKING_SECONDS = 30.0
LARGEST = 2**22
SERVING, MEMORY = "qembed_serving", "qembed_memory_bytes"


@dataclass(frozen=True)
class About:
    """What a server says; None for what it does not. `limit` is the longest text in tokens."""

    model: str
    limit: int | None = None
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    kernel: str | None = None


def about(url: str) -> About:
    """Ask the OpenAI-compatible server at `url`.

    Raises:
        BadInput: `url` is not a URL, nothing answers there, it wants a key, or what answers is no such server.
    """
    from qembed.client import embeddings

    model, limit = embeddings.served(url)
    told = _serving(url)
    return About(
        model, limit, _version(url), told.get("device"), told.get("dtype"), told.get("weights"), told.get("kernel") or None
    )


def memory(url: str) -> int | None:
    """Bytes that a `qembed serve` at `url` says it holds now; None if it is none."""
    from qembed.client import metrics

    told = metrics.total(metrics.parse(_text(url, "/metrics") or ""), MEMORY)
    return None if told is None else int(told)


def _version(url: str) -> str | None:
    """What /version of vLLM says; other servers have no such path."""
    try:
        said = json.loads(_text(url, "/version") or "")
    except (ValueError, RecursionError):
        return None
    version = said.get("version") if isinstance(said, dict) else None
    return version if isinstance(version, str) else None


def _serving(url: str) -> dict[str, str]:
    """The labels of a `qembed serve`'s metric SERVING; stock vLLM has no metric that tells its dtype."""
    from qembed.client import metrics

    found = metrics.parse(_text(url, "/metrics") or "").get(SERVING, {})
    return dict(next(iter(found), ()))


def _text(url: str, path: str) -> str | None:
    from qembed.client import embeddings

    headers = {"Authorization": f"Bearer {embeddings.key()}"}
    try:
        status, body = http.request(embeddings.base(url) + path, headers=headers, timeout=ASKING_SECONDS, largest=LARGEST)
    except (OSError, ValueError, HTTPException):
        return None
    return body.decode(errors="replace") if status == 200 else None
