"""A launch as arguments and environment of vLLM's server, and as rules of the gate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.text.prompts import DEFAULT_INSTRUCTION
from qembed.vllm import api_keys, engine_options, hosts, kernels, plan, plan_table
from qembed.vllm.devices import Device
from qembed.vllm.gate_rules import Rules
from qembed.vllm.prompt_models import prompt_models
from qembed.vllm.settings import BLOCK_SIZE, Launch

MMAP_THRESHOLD = 32 * 2**20
"""On a CPU, glibc allocates blocks from this many bytes on separately (mmap)."""
GATE = "qembed.serve.gate.Gate"
WORKERS: dict[Device, str] = {
    "cpu": "qembed.serve.vllm_plugin.cpu_worker.Worker",
    "cuda": "qembed.serve.vllm_plugin.gpu_worker.Worker",
}
SCHEDULER = "qembed.serve.vllm_plugin.scheduler.TextScheduler"
FORKED_THREADS = "QEMBED_THREADS"
"""The environment variable with the number of threads that a forked engine computes with."""
GPU_MARGIN = 1.1
POOLING = {"last": "LAST", "mean": "MEAN"}
"""vLLM's names of `Embedder.pooling`."""
FP8 = "fp8"
MAX_HEADER = 2**16
"""Bytes of a request's header. vLLM's 4 MiB per connection could add up to gigabytes before any key is checked."""
LOOPBACK = Path("/sys/class/net/lo")
SEVERAL_MACHINES = ("nnodes", "node-rank", "master-addr", "data-parallel-address", "distributed-executor-backend")
"""Settings of vLLM with which its processes may be on several machines."""
# The gate gets the keys through a pipe. With VLLM_API_KEY, vLLM itself would refuse requests that the gate has accepted.
SECRETS = ("QEMBED_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "HF_TOKEN")


def arguments(launch: Launch) -> list[str]:
    """The arguments of vLLM's OpenAI server."""
    settings = launch.settings
    words = [
        *engine_arguments(launch),
        *("--served-model-name", settings.name, *prompt_models(settings)),
        *("--host", settings.host),
        *("--port", str(launch.port)),
        *("--max-num-queued-reqs", str(settings.max_queue)),
        *("--shutdown-timeout", "0"),  # the gate has drained by then
        *("--middleware", GATE),
        *("--h11-max-incomplete-event-size", str(MAX_HEADER)),
        # No CORS: web pages must not use a server on their visitor's machine.
        *("--allowed-origins", "[]"),
        "--disable-uvicorn-access-log",
    ]
    for name in ("ssl_certfile", "ssl_keyfile"):
        if (file := getattr(settings, name)) is not None:
            words += [f"--{name.replace('_', '-')}", file]
    return words + user_arguments(launch)


def engine_arguments(launch: Launch) -> list[str]:
    """The arguments of vLLM's engine, with or without a server."""
    settings, trunk, reranker = launch.settings, launch.settings.checkpoint.trunk, launch.settings.checkpoint.reranker
    overrides: dict[str, object] = {**trunk.default_sizes, **trunk.attention_config} if reranker is None else reranker.overrides
    if launch.max_model_len > trunk.context:
        overrides["model_max_length"] = launch.max_model_len  # vLLM takes max_seq_length for the limit
    if plan.has_plain_positions(settings.checkpoint.config):
        # vLLM keeps a table of all positions; the 32,768 of the 0.6B take 17 MB.
        overrides["max_position_embeddings"] = launch.max_model_len
    if settings.converts_table:
        stored = settings.checkpoint.config["quantization_config"]
        overrides["quantization_config"] = {**stored, "quant_method": QUANT_METHOD, "token_table": INT8}
    words = [
        *("--model", str(settings.checkpoint.folder.resolve())),
        *("--runner", "pooling"),
        *("--convert", "embed" if reranker is None else "classify"),
        *("--load-format", "safetensors"),
        *("--dtype", launch.dtype),
        *("--max-model-len", str(launch.max_model_len)),
        *("--max-num-seqs", str(launch.sizes.max_num_seqs)),
        *("--max-num-batched-tokens", str(launch.longest_step)),
        *("--block-size", str(BLOCK_SIZE[launch.device])),
        *("--kv-cache-memory-bytes", str(launch.plan.kv_cache)),
        *("--hf-overrides", json.dumps(overrides)),
        *("--pooler-config", json.dumps(pooler_config(launch))),
        # Texts seldom share a first block, and a vector should not depend on earlier texts.
        "--no-enable-prefix-caching",
    ]
    if plan.reads_whole(launch.max_model_len, launch.longest_step):
        words.append("--no-enable-chunked-prefill")  # as keys and values are planned
    if not launch.keeps_cache:
        words += _layer_cache(launch)
    if launch.device == "cpu":
        # Compiling needs a C++ compiler, and takes half a minute at every start (85 s instead of 33 to 60).
        words.append("--enforce-eager")
    elif launch.target.memory:
        # At start vLLM requires this share of the GPU to be free. Its default is 90%, even with a cache size in bytes.
        share = min(0.95, GPU_MARGIN * launch.plan.total / launch.target.memory)
        words += ["--gpu-memory-utilization", f"{max(0.01, share):.3f}"]
    if settings.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", settings.kv_cache_dtype]
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if (size := getattr(settings, name)) > 1:
            words += [f"--{name.replace('_', '-')}", str(size)]
    return words


def pooler_config(launch: Launch) -> dict[str, object]:
    """How vLLM makes a vector of the tokens' states; it does not read every form in which 1_Pooling and modules.json say so."""
    checkpoint = launch.settings.checkpoint
    return {
        "seq_pooling_type": POOLING[checkpoint.trunk.pooling],
        "use_activation": launch.settings.normalized or checkpoint.reranker is not None,  # of one label it is the sigmoid
    }


def _layer_cache(launch: Launch) -> list[str]:
    """The arguments for texts that are computed whole (`vllm_plugin.layer_cache`): layers share keys and values."""
    causal = launch.settings.checkpoint.trunk.is_causal
    words = [
        *("--worker-cls", WORKERS[launch.device]),
        *("--scheduler-cls", SCHEDULER),
        *(
            "--additional-config",
            json.dumps({"qembed": {"step_tokens": launch.sizes.max_num_batched_tokens, "causal": causal}}),
        ),
        # vLLM would divide the bytes among the layers.
        *(("--num-gpu-blocks-override", str(launch.plan.kv_tokens // BLOCK_SIZE[launch.device])) if causal else ()),
    ]
    if launch.device == "cuda" and launch.settings.kv_cache_dtype == FP8:
        # Otherwise an Ada card would get FlashInfer, whose plan for a step cannot be divided into pieces.
        words += ["--attention-backend", "TRITON_ATTN"]
    return words


def user_arguments(launch: Launch) -> list[str]:
    """The user's `--engine-arg` settings. They come last, so they take precedence."""
    return [word for name, value in launch.settings.engine_args for word in engine_options.option(name, value)]


def rules(
    launch: Launch,
    token: str,
    restarts: int,
    listener: int | None = None,
    suspects: int | None = None,
    keys: Mapping[str, str] | None = None,
) -> Rules:
    """The rules of the gate. If keys are required, `token` is one more, for the process that starts the server.

    `listener` is the file descriptor of the listening socket, if vLLM is to use qembed's; `suspects` that of the table of texts
    in flight; `keys` are those in force (None: those of the settings).
    """
    settings, trunk, reranker = launch.settings, launch.settings.checkpoint.trunk, launch.settings.checkpoint.reranker
    sizes = list(trunk.sizes) or [trunk.width]
    return Rules(
        folder=str(settings.checkpoint.folder.resolve()),
        max_model_len=launch.max_model_len,
        dimensions=sizes if reranker is None else [],
        smallest=None if trunk.sizes or reranker is not None else trunk.smallest,
        prompts=dict(trunk.prompts),
        default_prompt=settings.prompt_name,
        model_prompt=trunk.default_prompt,
        prompt_models=prompt_models(settings),
        lower_case=trunk.lower_case,
        normalized=settings.normalized,
        instruction=None if reranker is None else settings.instruction or DEFAULT_INSTRUCTION,
        max_batch=settings.max_client_batch,
        max_body=settings.max_body,
        max_queue=settings.max_queue,
        max_connections=settings.max_connections,
        client_timeout=settings.client_timeout,
        clean=settings.clean,
        long_texts=settings.long_texts,
        allow_token_ids=settings.allow_token_ids,
        table_rows=settings.checkpoint.table_rows(),
        checks_ids=settings.checkpoint.vocabulary_warning is not None,
        hosts=hosts.allowed(settings.host, settings.allowed_hosts, has_keys=bool(settings.keys)),
        keys=key_hashes(settings.keys if keys is None else keys, token),
        plan=plan_table.lines(launch.plan, launch.device) | {"total": launch.plan.total},
        parts=settings.tensor_parallel_size * settings.data_parallel_size,
        restarts=restarts,
        about=_about(launch),
        listener=listener,
        suspects=suspects,
        access_log=settings.access_log,
        log_texts=settings.log_requests,
        engine_args=[name for name, _ in settings.engine_args],
    )


def key_hashes(keys: Mapping[str, str], token: str) -> dict[str, str | None]:
    """The names of keys by hash, with `token` for qembed itself; empty if no key is required."""
    return {**api_keys.hashes(keys), api_keys.hashed(token): None} if keys else {}


def _about(launch: Launch) -> dict[str, str]:
    """The labels of qembed_serving in /metrics; `qembed eval --url` reads them."""
    int8 = ", int8 token table" if launch.token_table == INT8 else ""
    weights = f"awq-int4{int8}" if launch.settings.checkpoint.is_int4 else "not quantized"
    return {"dtype": launch.dtype, "device": launch.device, "weights": weights, "kernel": launch.choice.kernel or ""}


def environment(launch: Launch, inherited: Mapping[str, str], cores: Sequence[int]) -> dict[str, str]:
    """The environment of the server: `inherited`, with variables for vLLM. `cores`: the CPUs that it may compute on."""
    variables = {
        **inherited,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a local folder
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(launch.settings.keep_alive),
    }
    for name in SECRETS:
        variables.pop(name, None)
    if launch.device == "cuda":
        # For the sampler, which a pooling model does not use, vLLM imports FlashInfer, and fails where it is missing.
        variables.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if LOOPBACK.exists() and not any(name in SEVERAL_MACHINES for name, _ in launch.settings.engine_args):
        # By default gloo, with which vLLM's processes talk to each other, listens on the address of the host's name.
        variables.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK.name)
    parts = launch.settings.tensor_parallel_size * launch.settings.data_parallel_size
    threads = launch.settings.threads
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(max(1, threads // parts))
    if launch.device == "cpu":
        # By default vLLM reserves a core for its scheduler: half of a machine with two cores.
        if threads is None:
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", _shares(cores, parts))
        else:
            # vLLM gives a worker a thread for each core that it is bound to, else OMP_NUM_THREADS.
            bound = parts <= threads <= len(cores)
            variables["VLLM_CPU_OMP_THREADS_BIND"] = _shares(cores[:threads], parts) if bound else "nobind"
        # By default glibc returns each freed activation to the system and gets new zeroed pages for the next, which takes
        # half of a step's time. With these thresholds it keeps as much memory as a step needs.
        variables.setdefault("MALLOC_MMAP_THRESHOLD_", str(MMAP_THRESHOLD))
        variables.setdefault("MALLOC_TRIM_THRESHOLD_", str(max(2 * MMAP_THRESHOLD, launch.plan.activations)))
        # It would override the planned cache.
        variables.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if launch.choice.kernel in ("qembed", "qembed-torch"):
            disabled = [name for name in variables.get(kernels.DISABLED_KERNELS, "").split(",") if name]
            variables[kernels.DISABLED_KERNELS] = ",".join(dict.fromkeys([*disabled, kernels.STOCK_KERNEL]))
    return variables


def server_environment(launch: Launch, inherited: Mapping[str, str], cores: Sequence[int]) -> dict[str, str]:
    """The environment of a server of its own process: `environment`, and whether it forks its engine (`server_process`)."""
    variables = environment(launch, inherited, cores)
    if launch.forks_engine:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker in one process
        variables[FORKED_THREADS] = variables.get("OMP_NUM_THREADS", str(len(cores)))
        variables["OMP_NUM_THREADS"] = "1"  # until the engine is forked: OpenMP's threads would be lost
    return variables


def _shares(cores: Sequence[int], parts: int) -> str:
    """The cores of each of `parts` workers, in vLLM's format. With fewer cores than workers, workers share cores."""
    shares = [cores[part::parts] or [cores[part % len(cores)]] for part in range(parts)]
    return "|".join(",".join(map(str, share)) for share in shares)
