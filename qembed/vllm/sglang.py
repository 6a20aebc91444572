"""SGLang instead of vLLM: the same checkpoint and limits as arguments of SGLang's server.

The gate (`qembed.serve.gate`) runs in vLLM's process. With SGLang there is no text cleaning, and no prompts, batch limit, body
limit or keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qembed.checkpoint.embedder import Embedder
from qembed.errors import BadInput, MissingExtra
from qembed.vllm import engine_options, plan

if TYPE_CHECKING:
    from qembed.vllm.settings import Launch, ServerSettings

LIMITATIONS = (
    "texts are not cleaned, the Host header and connections are not checked, and --max-client-batch, --max-body, --truncate, "
    "--default-prompt have no effect"
)


def check(settings: ServerSettings) -> None:
    """Check that SGLang is installed and supports these settings.

    Raises:
        BadInput: it does not support them.
        MissingExtra: it is not installed.
    """
    if find_spec("sglang") is None:
        raise MissingExtra("SGLang is not installed; pip install sglang (in an environment without vLLM: their pins differ)")
    check_settings(settings)


def check_settings(settings: ServerSettings) -> None:
    """Check that the settings need no feature that SGLang lacks.

    Raises:
        BadInput: they do.
    """
    if settings.checkpoint.has_int8_table or settings.converts_table:
        raise BadInput(
            "an INT8 token table needs qembed's vLLM plugin; quantize with --token-table float16, or serve with vLLM"
        )
    embedder = settings.checkpoint.embedder
    for wanted, reason in (
        (embedder.is_causal, "attention is bidirectional"),
        (embedder.pooling == "last", "vectors are means of all tokens"),
        (not embedder.dense, "it has a dense layer behind the pooling"),
        (settings.normalized, "its vectors have no unit length"),
        (not embedder.lower_case, "it reads texts in lower case"),
        (settings.prompt_name is None, "it has a default prompt"),
    ):
        if not wanted:
            raise BadInput(f"{settings.checkpoint.folder}: {reason}, with which qembed does not run SGLang; serve with vLLM")
    if settings.allowed_hosts:
        raise BadInput("--allowed-host has no effect with SGLang; serve with vLLM, or put a proxy in front")
    if settings.keys:
        raise BadInput("SGLang takes keys only on its command line, where `ps` shows them; serve with vLLM")


def _sizes(embedder: Embedder) -> Sequence[int]:
    """The sizes that vectors may be cut to: SGLang knows no range."""
    return embedder.sizes or range(embedder.smallest, embedder.width + 1)


def arguments(launch: Launch) -> list[str]:
    """The arguments of `python -m sglang.launch_server`.

    `--max-total-tokens` fixes the size of the cache; otherwise SGLang would take all free GPU memory.
    """
    settings, sizes = launch.settings, launch.sizes
    reads_whole = plan.reads_whole(sizes.max_model_len, sizes.max_num_batched_tokens)
    overrides = {"is_matryoshka": True, "matryoshka_dimensions": list(_sizes(settings.checkpoint.embedder))}
    words = [
        *("--model-path", str(settings.checkpoint.folder.resolve())),
        *("--served-model-name", settings.name),
        *("--host", settings.host),
        *("--port", str(launch.port)),
        "--is-embedding",
        *("--load-format", "safetensors"),
        *("--dtype", launch.dtype),
        *("--context-length", str(sizes.max_model_len)),
        *("--max-running-requests", str(sizes.max_num_seqs)),
        *("--chunked-prefill-size", "-1" if reads_whole else str(sizes.max_num_batched_tokens)),
        *("--max-prefill-tokens", str(sizes.max_num_batched_tokens)),
        *("--max-total-tokens", str(launch.plan.kv_tokens)),
        *("--max-queued-requests", str(settings.max_queue)),
        *("--json-model-override-args", json.dumps(overrides)),
        "--disable-radix-cache",
        "--enable-metrics",
    ]
    if launch.device == "cpu":
        words += ["--device", "cpu"]
    if settings.kv_cache_dtype == "fp8":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    if settings.tensor_parallel_size > 1:
        words += ["--tp-size", str(settings.tensor_parallel_size)]
    if settings.data_parallel_size > 1:
        words += ["--dp-size", str(settings.data_parallel_size)]
    if settings.ssl_certfile and settings.ssl_keyfile:
        words += ["--ssl-certfile", settings.ssl_certfile, "--ssl-keyfile", settings.ssl_keyfile]
    if settings.log_requests:
        words.append("--log-requests")
    for name, value in settings.engine_args:
        words += engine_options.option(name, value)
    return words
