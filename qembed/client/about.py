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


def about(url: str, api_key: str | None = None) -> About:
    """Query the OpenAI-compatible server at `url`.

    Raises:
        BadInput: `url` is not a URL, nothing answers there, a key is required, or the answer is not from such a server.
    """
    from qembed.client import embeddings

    model, limit = embeddings.served(url, api_key)
    labels = _serving(url, api_key)
    return About(
        model,
        limit,
        _version(url, api_key),
        labels.get("device"),
        labels.get("dtype"),
        labels.get("weights"),
        labels.get("kernel") or None,
    )


def memory(url: str, api_key: str | None = None) -> int | None:
    """Bytes in use as reported by a `qembed serve` at `url`; None for other servers."""
    from qembed.client import metrics

    value = metrics.total(metrics.parse(_text(url, "/metrics", api_key) or ""), MEMORY)
    return None if value is None else int(value)


def as_it_is(url: str, api_key: str | None = None) -> dict[str, str]:
    """The fields of a request to the server at `url` that keep it from putting its default prompt before the texts.

    Empty unless it is a `qembed serve --default-prompt`: other servers get no field that they do not know.
    """
    version = _version_fields(url, api_key)
    return {"prompt_name": ""} if version.get("qembed") and version.get("default_prompt") else {}


def reranks(url: str, api_key: str | None = None) -> bool:
    """Whether the server at `url` is a `qembed serve` with a reranker."""
    version = _version_fields(url, api_key)
    return bool(version.get("qembed")) and version.get("task") == "rerank"


def with_model_prompt(url: str, api_key: str | None = None) -> dict[str, str]:
    """The fields of a request to the server at `url` with which it puts the model's default prompt before the texts, if any.

    Empty for other servers than `qembed serve`, and where the server does the same without them.
    """
    version = _version_fields(url, api_key)
    own, default = version.get("model_prompt"), version.get("default_prompt")
    return {"prompt_name": str(own or "")} if version.get("qembed") and own != default else {}


def _version(url: str, api_key: str | None) -> str | None:
    from qembed.client import embeddings

    version = _version_fields(url, api_key).get("version")
    return embeddings.shown(version) if isinstance(version, str) else None


def _version_fields(url: str, api_key: str | None) -> dict[str, Any]:
    """The answer of /version, which vLLM has; empty for other servers."""
    try:
        fields = json.loads(_text(url, "/version", api_key) or "")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _serving(url: str, api_key: str | None) -> dict[str, str]:
    """The labels of `qembed serve`'s metric SERVING; stock vLLM has no metric for its dtype."""
    from qembed.client import embeddings, metrics

    samples = metrics.parse(_text(url, "/metrics", api_key) or "").get(SERVING, {})
    return {name: embeddings.shown(value) for name, value in next(iter(samples), ())}


def _text(url: str, path: str, api_key: str | None) -> str | None:
    from qembed.client import embeddings

    headers = {"Authorization": f"Bearer {api_key or embeddings.key()}"}
    try:
        status, body = http.request(embeddings.base(url) + path, headers=headers, timeout=ASKING_SECONDS, largest=LARGEST)
    except (OSError, ValueError, HTTPException):
        return None
    return body.decode(errors="replace") if status == 200 else None
