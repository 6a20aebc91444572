"""What a running server tells of itself: its model, its version, and, if it is a `qembed serve`, what it computes in."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from qembed.errors import BadInput

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


def base(url: str) -> str:
    """The URL without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


def about(url: str) -> About:
    """Ask the OpenAI-compatible server at `url`.

    Raises:
        BadInput: `url` is not a URL, nothing answers there, it wants a key, or what answers is no such server.
    """
    model, limit = _served(url)
    told = _serving(url)
    return About(model, limit, _version(url), told.get("device"), told.get("dtype"), told.get("weights"))


def memory(url: str) -> int | None:
    """Bytes that a `qembed serve` at `url` says it holds now; None if it is none."""
    from qembed.serve import readings

    told = readings.total(readings.parse(_text(url, "/metrics") or ""), MEMORY)
    return None if told is None else int(told)


def _served(url: str) -> tuple[str, int | None]:
    """The first model that the server at `url` lists, and its longest text where it says so (vLLM does)."""
    import openai

    from qembed.serve import client

    try:
        address = urlsplit(url)
        known = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        known = False
    if not known:
        raise BadInput(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
    api = openai.OpenAI(base_url=base(url) + "/v1", api_key=client.key(), timeout=ASKING_SECONDS, max_retries=0)
    try:
        models = list(api.models.list())
    except openai.APIConnectionError as error:
        raise BadInput(f"{url}: nothing answers there; is the server up?") from error
    except openai.AuthenticationError as error:
        raise BadInput(f"{url}: the server asks for a key; set QEMBED_API_KEY") from error
    except openai.APIStatusError as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers {error.status_code}") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers with something else") from error
    if not models:
        raise BadInput(f"{url}: serves no model")
    limit = getattr(models[0], "max_model_len", None)
    return models[0].id, limit if isinstance(limit, int) else None


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
    from qembed.serve import readings

    found = readings.parse(_text(url, "/metrics") or "").get(SERVING, {})
    return dict(next(iter(found), ()))


def _text(url: str, path: str) -> str | None:
    from qembed.serve import client

    request = urllib.request.Request(base(url) + path, headers={"Authorization": f"Bearer {client.key()}"})
    try:
        with urllib.request.urlopen(request, timeout=ASKING_SECONDS) as answer:
            return str(answer.read(LARGEST).decode("utf-8", "replace"))
    except (OSError, ValueError):
        return None
