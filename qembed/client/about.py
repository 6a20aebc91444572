"""What a running server reports about itself: model, version, and for `qembed serve` dtype, device, weights and kernel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from qembed.client import http

ASKING_SECONDS = 30.0
LARGEST = 2**22
SERVING, MEMORY = "qembed_serving", "qembed_memory_bytes"


@dataclass(frozen=True)
class About:
    """A server's description; None for unknown values. `limit` is the longest text in tokens."""

    model: str
    limit: int | None = None
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    kernel: str | None = None


def about(url: str) -> About:
    """Query the OpenAI-compatible server at `url`.

    Raises:
        BadInput: `url` is not a URL, nothing answers there, a key is required, or the answer is not from such a server.
    """
    from qembed.client import embeddings

    model, limit = embeddings.served(url)
    told = _serving(url)
    return About(
        model, limit, _version(url), told.get("device"), told.get("dtype"), told.get("weights"), told.get("kernel") or None
    )


def memory(url: str) -> int | None:
    """Bytes in use as reported by a `qembed serve` at `url`; None for other servers."""
    from qembed.client import metrics

    told = metrics.total(metrics.parse(_text(url, "/metrics") or ""), MEMORY)
    return None if told is None else int(told)


def as_it_is(url: str) -> dict[str, str]:
    """The fields of a request to the server at `url` that keep it from putting its default prompt before the texts.

    Empty unless it is a `qembed serve --default-prompt`: other servers get no field that they do not know.
    """
    version = _version_fields(url)
    return {"prompt_name": ""} if version.get("qembed") and version.get("default_prompt") else {}


def _version(url: str) -> str | None:
    version = _version_fields(url).get("version")
    return version if isinstance(version, str) else None


def _version_fields(url: str) -> dict[str, Any]:
    """The answer of /version, which vLLM has; empty for other servers."""
    try:
        fields = json.loads(_text(url, "/version") or "")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _serving(url: str) -> dict[str, str]:
    """The labels of `qembed serve`'s metric SERVING; stock vLLM has no metric for its dtype."""
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
