"""A small client of an OpenAI-compatible embedding server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput, QembedError

if TYPE_CHECKING:
    import openai

BATCH_SIZE = 32
TIMEOUT = 300.0
ASKING_SECONDS = 30.0


def embed(
    texts: Sequence[str],
    *,
    url: str,
    model: str | None = None,
    dimensions: int | None = None,
    batch_size: int = BATCH_SIZE,
    timeout: float = TIMEOUT,
    on_progress: Callable[[int], None] | None = None,
    finite: bool = True,
    api_key: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """The vectors [len(texts), dimensions] of `texts`, in their order, from the server at `url`.

    `model` None: the server's only model. `dimensions` None: whole vectors. Each request has `batch_size` texts and times out
    after `timeout` seconds. `on_progress` is called with the number of finished texts. `api_key` None: the key, if one is
    required, comes from QEMBED_API_KEY or OPENAI_API_KEY. With `finite` False vectors that contain NaN or infinity are
    returned as they are. Requests have `fields` beside OpenAI's; None: those of `about.as_it_is`, with which the server puts
    no prompt before the texts.

    Raises:
        BadInput: no texts, or the server rejects them; the message is the server's.
        QembedError: no server answers, it fails, or it does not return a vector per text.
    """
    import openai

    from qembed.client.about import as_it_is

    if not texts:
        raise BadInput("there are no texts to embed")
    rows: list[list[float]] = []
    with connected(url, timeout, api_key) as server:
        name = model or _only_model(server, url)
        own_fields = dict(as_it_is(url, api_key) if fields is None else fields) or None
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            # The openai package asks for base64 and decodes it, which is exact and a third of the size of JSON numbers.
            answer = server.embeddings.create(
                model=name, input=batch, dimensions=dimensions or openai.omit, extra_body=own_fields
            )
            rows.extend(item.embedding for item in sorted(answer.data, key=lambda item: item.index))
            if len(rows) != start + len(batch):
                raise QembedError(f"{url}: {len(answer.data)} vectors for {len(batch)} texts")
            if on_progress:
                on_progress(len(rows))
    return _matrix(rows, url, finite)


def served(url: str, api_key: str | None = None) -> tuple[str, int | None]:
    """The first model that the server at `url` lists, and its longest text if the server reports it (vLLM does).

    Raises:
        BadInput: `url` is not a URL, nothing answers there, a key is required, or the answer is not from such a server.
    """
    import openai

    try:
        address = urlsplit(url)
        known = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        known = False
    if not known:
        raise BadInput(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
    api = openai.OpenAI(base_url=base(url) + "/v1", api_key=api_key or key(), timeout=ASKING_SECONDS, max_retries=0)
    try:
        models = list(api.models.list())
    except openai.APIConnectionError as error:
        raise BadInput(f"{url}: nothing answers there; is the server up?") from error
    except openai.AuthenticationError as error:
        raise BadInput(f"{url}: the server asks for a key; give --api-key-file or QEMBED_API_KEY") from error
    except openai.APIStatusError as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers {error.status_code}") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers with something else") from error
    if not models:
        raise BadInput(f"{url}: serves no model")
    limit = getattr(models[0], "max_model_len", None)
    return models[0].id, limit if isinstance(limit, int) else None


def base(url: str) -> str:
    """The server's URL, given that or its API's (…/v1)."""
    return url.rstrip("/").removesuffix("/v1")


def key() -> str:
    """The API key to send: the first in QEMBED_API_KEY (which may hold several), otherwise OPENAI_API_KEY."""
    first = os.environ.get("QEMBED_API_KEY", "").partition(",")[0].strip()
    return first or os.environ.get("OPENAI_API_KEY") or "none"


@contextmanager
def connected(url: str, timeout: float, api_key: str | None = None) -> Iterator[openai.OpenAI]:
    """An openai client of the server at `url`; its exceptions are converted to QembedError."""
    import openai

    try:
        with openai.OpenAI(base_url=base(url) + "/v1", api_key=api_key or key(), timeout=timeout) as server:
            yield server
    except openai.APITimeoutError as error:
        raise QembedError(f"{url}: no answer within {timeout:g} s") from error
    except openai.APIConnectionError as error:
        raise QembedError(f"{url}: no server answers there") from error
    except openai.APIStatusError as error:
        kind = BadInput if error.status_code in (400, 422) else QembedError
        raise kind(f"{url}: HTTP status {error.status_code}: {said(error)}") from error
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise QembedError(f"{url}: no OpenAI-compatible embedding server ({type(error).__name__})") from error


def _only_model(server: openai.OpenAI, url: str) -> str:
    names = [model.id for model in server.models.list().data]
    if len(names) != 1:
        raise QembedError(f"{url}: serves {len(names)} models ({', '.join(names) or 'none'}); name one")
    return names[0]


def _matrix(rows: list[list[float]], url: str, finite: bool) -> NDArray[np.float32]:
    if len({len(row) for row in rows}) != 1:
        raise QembedError(f"{url}: vectors of different lengths")
    matrix = np.asarray(rows, dtype=np.float32)
    if finite and not np.isfinite(matrix).all():
        raise QembedError(f"{url}: a vector holds NaN or infinity")
    return matrix


def said(error: openai.APIStatusError) -> str:
    """The server's error message in one line."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())
