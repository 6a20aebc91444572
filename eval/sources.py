"""Where vectors come from: vLLM that is started for it, transformers in this process, or a server that runs already.

A `Side` is known before anything starts; opening it gives a `Source` that embeds. One side is closed before the other opens,
so both never share the memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput, MissingExtra, QembedError

INT4 = "awq-int4"
INT4_INT8 = "awq-int4, int8 token table"
ASKING_SECONDS = 30.0
OnDone = Callable[[int], None]
OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Something that embeds, and what it says of itself; None for what it does not tell.

    `embed` takes texts with their prompts and hears the number of texts after each batch; it returns [texts, d] float32.
    `limit` is the longest text in tokens, the appended last token included.
    """

    engine: str
    model: str
    weights: str | None
    device: str | None
    dtype: str | None
    url: str | None
    limit: int | None
    embed: Callable[[Sequence[str], OnDone], NDArray[np.float32]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its longest text, as far as that is known before it is opened, and how to open it.

    `open` tells what is being done, in a few words, to the function it is given.
    """

    limit: int | None
    open: Callable[[OnStage], AbstractContextManager[Source]]


def server(url: str) -> Side:
    """A running OpenAI-compatible server, asked at once which model it serves.

    Raises:
        BadInput: `url` is not a URL, or what answers there is no such server.
        QembedError: nothing answers.
    """
    model, limit = _served(url)
    source = Source("server", model, None, None, None, url, limit, partial(_through_client, url, model))
    return Side(limit, lambda _: nullcontext(source))


def vllm(checkpoint: Checkpoint) -> Side:
    """The INT4 checkpoint through vLLM, which is started when the side is opened and ended with it.

    Raises:
        MissingExtra: vLLM is not installed.
    """
    if not has_vllm():
        raise MissingExtra("vLLM is not installed: install qembed[gpu] or qembed[cpu], or use --engine transformers")
    return Side(context(checkpoint), partial(_vllm, checkpoint))


def transformers(checkpoint: Checkpoint, *, exact: bool = False) -> Side:
    """The checkpoint through transformers: in float16 on a GPU unless `exact`, in float32 on a CPU."""
    return Side(context(checkpoint), partial(_transformers, checkpoint, exact))


def has_vllm() -> bool:
    """Whether vLLM can be imported, by its presence alone."""
    return find_spec("vllm") is not None


def context(checkpoint: Checkpoint) -> int | None:
    """The longest text in tokens that config.json allows."""
    limit = checkpoint.config.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def stored(checkpoint: Checkpoint) -> str:
    """What the weights are: INT4, INT4_INT8, or the dtype that most of the tensors are stored in."""
    if checkpoint.is_int4:
        return INT4_INT8 if checkpoint.has_int8_table else INT4
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    dtypes = [dtype for _, dtype in checkpoint.shapes().values()]
    most = max(set(dtypes), key=dtypes.count)
    return names.get(most, most)


@contextmanager
def _transformers(checkpoint: Checkpoint, exact: bool, on_stage: OnStage) -> Iterator[Source]:
    on_stage("loading the weights")
    import torch

    from qembed.eval import reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if exact or device == "cpu" else "float16"
    loaded = reference.load(checkpoint, dtype, device)

    def embed(texts: Sequence[str], on_done: OnDone) -> NDArray[np.float32]:
        return reference.embed(loaded, texts, on_done=on_done)

    yield Source("transformers", checkpoint.name, stored(checkpoint), device, dtype, None, loaded.limit, embed)


@contextmanager
def _vllm(checkpoint: Checkpoint, on_stage: OnStage) -> Iterator[Source]:
    from qembed.serve import engine

    with engine.running(checkpoint, on_stage) as running:
        embed = partial(_through_client, running.url, running.model)
        yield Source("vllm", checkpoint.name, stored(checkpoint), running.device, running.dtype, None, running.limit, embed)


def _served(url: str) -> tuple[str, int | None]:
    """The first model that the server at `url` lists, and its longest text where it says so (vLLM does)."""
    import openai

    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise BadInput(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
    api = openai.OpenAI(
        base_url=url.rstrip("/").removesuffix("/v1") + "/v1",
        api_key=os.environ.get("QEMBED_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none",
        timeout=ASKING_SECONDS,
        max_retries=0,
    )
    try:
        models = list(api.models.list())
    except openai.APIConnectionError as error:
        raise QembedError(f"{url}: nothing answers there; is the server up?") from error
    except openai.APIStatusError as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers {error.status_code}") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{url}: not an OpenAI-compatible server: /v1/models answers with something else") from error
    if not models:
        raise BadInput(f"{url}: serves no model")
    limit = getattr(models[0], "max_model_len", None)
    return models[0].id, limit if isinstance(limit, int) else None


def _through_client(url: str, model: str, texts: Sequence[str], on_done: OnDone) -> NDArray[np.float32]:
    from qembed.serve import client

    heard = 0

    def progressed(done: int) -> None:
        nonlocal heard
        on_done(done - heard)
        heard = done

    return client.embed(texts, url=url, model=model, on_progress=progressed)
