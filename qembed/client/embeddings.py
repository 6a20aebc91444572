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
from qembed.text.display import counted, one_line

if TYPE_CHECKING:
    import openai

BATCH_SIZE = 32
TIMEOUT = 300.0
ASKING_SECONDS = 30.0
LONGEST_SHOWN = 500
"""Characters of a server's message or name that are shown."""
LONGEST_NAME = 1000
"""Characters of a model's name."""
LONGEST_WAIT = 60.0
"""Seconds that a server may make a client wait before it asks again."""


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
    required, comes from QEMBED_API_KEY or OPENAI_API_KEY. With `finite` False vectors that contain NaN or infinity, or only
    zeros, are returned as they are. Requests have `fields` beside OpenAI's; None: those of `about.as_it_is`, with which the
    server puts no prompt before the texts.

    Raises:
        BadInput: no texts, or the server rejects them; the message is the server's.
        QembedError: no server answers, it fails, or it does not return a vector per text.
    """
    import openai

    from qembed.client.about import as_it_is

    if not texts:
        raise BadInput("there are no texts to embed")
    rows: list[NDArray[np.float32]] = []
    with connected(url, timeout, api_key) as server:
        name = model or _only_model(server, url)
        own_fields = dict(as_it_is(url, api_key) if fields is None else fields) or None
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            # The openai package asks for base64 and decodes it, which is exact and a third of the size of JSON numbers.
            answer = server.embeddings.create(
                model=name, input=batch, dimensions=dimensions or openai.omit, extra_body=own_fields
            )
            batch_vectors = vectors(answer, len(batch), url, rows[0].shape[1] if rows else dimensions)
            if finite and not np.isfinite(batch_vectors).all():
                raise QembedError(f"{url}: a vector holds NaN or infinity")
            if finite and not batch_vectors.any(axis=1).all():
                raise QembedError(f"{url}: a vector of zeros")
            rows.append(batch_vectors)
            if on_progress:
                on_progress(start + len(batch))
    return np.concatenate(rows)


def vectors(answer: Any, count: int, url: str, length: int | None = None) -> NDArray[np.float32]:
    """The vectors [count, d] of an answer in the order of its texts; a row may hold NaN, infinity or only zeros.

    The server is not trusted: whatever it answers either becomes such a matrix or one of these errors. `length`: the d that
    is expected; None: any.

    Raises:
        QembedError: the answer has not one vector for each text, all of one length and of numbers.
    """
    data = getattr(answer, "data", None)
    if not isinstance(data, list) or len(data) != count:
        received = f"{len(data)} vectors" if isinstance(data, list) else "no list of vectors"
        raise QembedError(f"{url}: {received} for {counted(count, 'text')}")
    numbered = {getattr(item, "index", None): getattr(item, "embedding", None) for item in data}
    if any(type(place) is not int for place in numbered) or numbered.keys() != set(range(count)):
        raise QembedError(f"{url}: the vectors of its answer are not numbered from 0 to {count - 1}")
    rows: list[Any] = [numbered[place] for place in range(count)]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise QembedError(f"{url}: vectors of different lengths, or none, in one answer")
    if length is not None and lengths != {length}:
        raise QembedError(f"{url}: vectors of {lengths.pop()} numbers where {length} were expected")
    if not all(type(number) in (float, int) for row in rows for number in row):
        raise QembedError(f"{url}: a vector holds something else than numbers")
    with np.errstate(over="ignore"):
        matrix = np.asarray(rows, dtype=np.float64).astype(np.float32)
    return matrix


def served(url: str, api_key: str | None = None) -> tuple[str, int | None]:
    """The first model that the server at `url` lists, and its longest text if the server reports it (vLLM does).

    Raises:
        BadInput: `url` is not a URL, nothing answers there, a key is required, or the answer is not from such a server.
    """
    import openai

    from qembed.client import bounded

    try:
        address = urlsplit(url)
        known = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        known = False
    if not known:
        raise BadInput(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
    try:
        with bounded.client(url, api_key, ASKING_SECONDS, max_retries=0) as api:
            models = list(api.models.list())
    except openai.APIConnectionError as error:
        raise BadInput(f"{url}: {bounded.unreadable(error) or 'nothing answers there; is the server up?'}") from error
    except openai.AuthenticationError as error:
        raise BadInput(f"{url}: the server asks for a key; give --api-key-file or QEMBED_API_KEY") from error
    except openai.APIStatusError as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers {error.status_code}") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        reason = bounded.unreadable(error) or "/v1/models answers with something else"
        raise BadInput(f"{url}: not an OpenAI-compatible server: {reason}") from error
    if not models:
        raise BadInput(f"{url}: serves no model")
    name, limit = getattr(models[0], "id", None), getattr(models[0], "max_model_len", None)
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models names a model {shown(repr(name))}")
    return name, limit if type(limit) is int and limit > 0 else None


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

    from qembed.client import bounded

    try:
        with bounded.client(url, api_key, timeout) as server:
            yield server
    except openai.APITimeoutError as error:
        raise QembedError(f"{url}: no answer within {timeout:g} s") from error
    except openai.APIConnectionError as error:
        raise QembedError(f"{url}: {bounded.unreadable(error) or 'no server answers there'}") from error
    except openai.APIStatusError as error:
        kind = BadInput if error.status_code in (400, 422) else QembedError
        raise kind(f"{url}: HTTP status {error.status_code}: {message_of(error)}") from error
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = bounded.unreadable(error) or f"no OpenAI-compatible embedding server ({type(error).__name__})"
        raise QembedError(f"{url}: {reason}") from error


def _only_model(server: openai.OpenAI, url: str) -> str:
    models = server.models.list().data
    names = [str(model.id) for model in models]
    # After its model's name `qembed serve` lists those with a prompt; vLLM names the checkpoint of each as `root`.
    roots = {str(getattr(model, "root", None) or model.id) for model in models}
    if len(roots) != 1:
        raise QembedError(f"{url}: serves {len(names)} models ({shown(', '.join(names)) or 'none'}); name one")
    return names[0]


def message_of(error: openai.APIStatusError) -> str:
    """The server's error message in one line."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return shown(message or error.message)


def shown(value: object) -> str:
    """What a server says, in one line of bounded length that does not control a terminal."""
    text = one_line(str(value)[: 4 * LONGEST_SHOWN])
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def retry_after(error: openai.APIStatusError) -> float:
    """The seconds to wait that a server asks for, from 0 to LONGEST_WAIT; 0 if it names none."""
    try:
        seconds = float(error.response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_WAIT) if seconds > 0 else 0.0
