"""A launch in vLLM's own words: the arguments and the environment of its server, and the rules of the gate before it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qembed.checkpoint import matryoshka
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.vllm import api_keys, engine_options, kernels, plan, plan_table
from qembed.vllm.gate_rules import Rules
from qembed.vllm.settings import BLOCK_SIZE, Launch

MMAP_THRESHOLD = 32 * 2**20
"""From how many bytes on glibc gives an allocation pages of its own, on a CPU."""
GATE = "qembed.serve.gate.Gate"
MARGIN = 1.1
# Keys go to the server through a pipe; and vLLM's own would refuse requests that ours have let in.
SECRETS = ("QEMBED_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "HF_TOKEN")


def arguments(launch: Launch) -> list[str]:
    """The arguments of vLLM's OpenAI server."""
    settings = launch.settings
    chosen = [
        *engine_arguments(launch),
        *("--served-model-name", settings.name),
        *("--host", settings.host),
        *("--port", str(launch.port)),
        *("--max-num-queued-reqs", str(settings.max_queue)),
        *("--shutdown-timeout", "0"),  # the gate has let everything finish by then
        *("--middleware", GATE),
        # A page of another site must not use a server on this machine through its visitor's browser.
        *("--allowed-origins", "[]"),
        "--disable-uvicorn-access-log",
    ]
    for name in ("ssl_certfile", "ssl_keyfile"):
        if (file := getattr(settings, name)) is not None:
            chosen += [f"--{name.replace('_', '-')}", file]
    return chosen + user_arguments(launch)


def engine_arguments(launch: Launch) -> list[str]:
    """The arguments of vLLM's engine itself, whether a server stands before it or not."""
    settings = launch.settings
    overrides: dict[str, object] = {
        "is_matryoshka": True,
        "matryoshka_dimensions": matryoshka.sizes(launch.hidden_size),
    }
    if plan.has_plain_positions(settings.checkpoint.config):
        # vLLM holds a table of all positions; the 0.6B's 32,768 take 17 MB.
        overrides["max_position_embeddings"] = launch.max_model_len
    if settings.makes_table:
        stored = settings.checkpoint.config["quantization_config"]
        overrides["quantization_config"] = {**stored, "quant_method": QUANT_METHOD, "token_table": INT8}
    chosen = [
        *("--model", str(settings.checkpoint.folder.resolve())),
        *("--runner", "pooling"),
        *("--convert", "embed"),
        *("--load-format", "safetensors"),
        *("--dtype", launch.dtype),
        *("--max-model-len", str(launch.max_model_len)),
        *("--max-num-seqs", str(launch.sizes.max_num_seqs)),
        *("--max-num-batched-tokens", str(launch.sizes.max_num_batched_tokens)),
        *("--block-size", str(BLOCK_SIZE[launch.device])),
        *("--kv-cache-memory-bytes", str(launch.plan.kv_cache)),
        *("--hf-overrides", json.dumps(overrides)),
        # Texts seldom share a first block, and a vector should not depend on which text came before.
        "--no-enable-prefix-caching",
    ]
    if plan.reads_whole(launch.max_model_len, launch.sizes.max_num_batched_tokens):
        chosen.append("--no-enable-chunked-prefill")  # the cache is planned for it
    if launch.device == "cpu":
        # Compiled code needs a C++ compiler on the machine, and half a minute more at every start (85 s instead of 33 to 60).
        chosen.append("--enforce-eager")
    elif launch.target.memory:
        # At start vLLM wants this part of the card to be free: 90% unless told otherwise, even if the cache is given in bytes.
        share = min(0.95, MARGIN * launch.plan.total / launch.target.memory)
        chosen += ["--gpu-memory-utilization", f"{max(0.01, share):.3f}"]
    if settings.kv_cache_dtype != "auto":
        chosen += ["--kv-cache-dtype", settings.kv_cache_dtype]
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if (size := getattr(settings, name)) > 1:
            chosen += [f"--{name.replace('_', '-')}", str(size)]
    return chosen


def user_arguments(launch: Launch) -> list[str]:
    """The settings that the user gave in vLLM's own words. They come last, and so overrule."""
    return [word for name, value in launch.settings.engine_args for word in engine_options.option(name, value)]


def rules(launch: Launch, token: str, restarts: int, listener: int | None = None) -> Rules:
    """What the gate in front of vLLM lets in. `token` is a key for the one who starts the server, where keys are asked for.

    `listener` is the number of a socket that listens already.
    """
    settings = launch.settings
    return Rules(
        folder=str(settings.checkpoint.folder.resolve()),
        max_model_len=launch.max_model_len,
        dimensions=matryoshka.sizes(launch.hidden_size),
        prompts=settings.checkpoint.prompts,
        default_prompt=settings.default_prompt,
        max_batch=settings.max_client_batch,
        max_body=settings.max_body,
        max_queue=settings.max_queue,
        clean=settings.clean,
        truncate=settings.truncate,
        allow_token_ids=settings.allow_token_ids,
        keys=[api_keys.hashed(key) for key in (*settings.keys, token)] if settings.keys else [],
        plan=plan_table.lines(launch.plan, launch.device) | {"total": launch.plan.total},
        parts=settings.tensor_parallel_size * settings.data_parallel_size,
        restarts=restarts,
        about=_about(launch),
        listener=listener,
        log_texts=settings.log_requests,
        engine_args=[name for name, _ in settings.engine_args],
    )


def _about(launch: Launch) -> dict[str, str]:
    """What /metrics tells of the server; `qembed eval --url` reads it."""
    int8 = ", int8 token table" if launch.token_table == INT8 else ""
    weights = f"awq-int4{int8}" if launch.settings.checkpoint.is_int4 else "not quantized"
    return {"dtype": launch.dtype, "device": launch.device, "weights": weights, "kernel": launch.choice.kernel or ""}


def environment(launch: Launch, inherited: Mapping[str, str], cores: Sequence[int]) -> dict[str, str]:
    """The environment of the server: `inherited`, with what vLLM needs to know about this machine's `cores`."""
    chosen = {
        **inherited,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a local folder by now
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in SECRETS:
        chosen.pop(name, None)
    if launch.device == "cpu":
        # Left to itself vLLM keeps a core back for its scheduler, which on two cores is half of the machine.
        parts = launch.settings.tensor_parallel_size * launch.settings.data_parallel_size
        chosen.setdefault("VLLM_CPU_OMP_THREADS_BIND", _shares(cores, parts))
        # glibc gives each freed activation back to the system, and takes new, zeroed pages for the next one: half of the time
        # of a step. So it keeps as much as a step takes.
        chosen.setdefault("MALLOC_MMAP_THRESHOLD_", str(MMAP_THRESHOLD))
        chosen.setdefault("MALLOC_TRIM_THRESHOLD_", str(max(2 * MMAP_THRESHOLD, launch.plan.activations)))
        # It would overrule the planned cache.
        chosen.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if launch.choice.kernel in ("qembed", "qembed-torch"):
            disabled = [name for name in chosen.get(kernels.DISABLED, "").split(",") if name]
            chosen[kernels.DISABLED] = ",".join(dict.fromkeys([*disabled, kernels.VLLMS]))
    return chosen


def _shares(cores: Sequence[int], parts: int) -> str:
    """Cores for each of `parts` workers, as vLLM wants them; with fewer cores than workers some share one."""
    shares = [cores[part::parts] or [cores[part % len(cores)]] for part in range(parts)]
    return "|".join(",".join(map(str, share)) for share in shares)
