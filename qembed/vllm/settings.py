"""The settings of a server, and `resolve`, which adds device, dtype, kernel, sizes and memory plan to make a `Launch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import short_name
from qembed.checkpoint.int8_table import INT8
from qembed.errors import BadInput
from qembed.sizes import gib
from qembed.vllm import fit, float16, hosts, kernels, plan
from qembed.vllm.devices import Device, Target
from qembed.vllm.task import check_task

HOST = "127.0.0.1"
LOCAL = {HOST, "localhost", "::1"}
PORT = 8000
MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 2048
MAX_CLIENT_BATCH = 2048
MAX_QUEUE = 4096
MAX_BODY = 32 * 2**20
STARTUP_TIMEOUT = 600.0
SHUTDOWN_TIMEOUT = 10.0
KEEP_ALIVE = 75
"""Longer than the usual proxies keep an idle connection (60 s), so that none sends a request as the server closes it."""
CLIENT_TIMEOUT = 30.0
MAX_CONNECTIONS = 1024
HANG_TIMEOUT = 120.0
MIN_HANG_TIMEOUT = 5.0
"""A step of a model that is busy elsewhere takes a second or two."""
MAX_RESTARTS = 5
# With vLLM's default of 128 tokens on a CPU, 32 short sequences would take 4,096 tokens of mostly empty cache.
BLOCK_SIZE: dict[Device, int] = {"cpu": 32, "cuda": 16}
SHORTEST_DEFAULT = 2048
"""Tokens; the default of the longest text is halved down to this while the plan does not fit."""
NEED_CACHE = (
    "additional-config", "async-scheduling", "enable-chunked-prefill", "enable-prefix-caching", "kv-transfer-config",
    "num-gpu-blocks-override", "pipeline-parallel-size", "scheduler-cls", "worker-cls",
)  # fmt: skip
"""Settings of vLLM that need a KV cache, or that `vllm_plugin.layer_cache` itself uses."""
MIN_CAPABILITY = 7.5


@dataclass(frozen=True)
class ServerSettings:
    """A user's settings. Lengths are in tokens, times in seconds; `port` 0 is a free one; None means: choose a value.

    Attributes:
        token_table: "int8" converts a float table to INT8 while it loads; None leaves it as stored.
        memory: a budget in bytes; sizes that are None are then chosen to fit.
        kv_cache: whether every layer keeps keys and values of its own (`Launch.keeps_cache`).
        kv_cache_dtype: "auto" (the dtype of the computation) or "fp8".
        max_client_batch: maximum texts in one request.
        max_queue: maximum texts waiting or being computed.
        max_body: maximum bytes of a request.
        clean: whether texts are cleaned (`qembed.text.cleaning`).
        long_texts: what becomes of texts that are too long (`gate_rules.LONG_TEXTS`), unless the request says otherwise.
        default_prompt: the name of the prompt for requests without one; "": none; None: the model's own.
        prompt_names: whether the model also answers to its name with a prompt's (`prompt_models.py`).
        normalize: whether vectors get unit length where the model does not scale them.
        allow_token_ids: whether token ids are accepted instead of texts.
        instruction: a reranker's task for requests without one; None: that of the model card.
        allowed_hosts: further names by which requests may call the server (`hosts`).
        keys: the name of each API key, one of which a request must have; empty: no key is required.
        key_file: the file that they come from, which is read again when it changes.
        ssl_certfile, ssl_keyfile: both or neither; both for HTTPS.
        keep_alive: seconds that an idle connection stays open.
        client_timeout: seconds that a client may take to send a header or a body, or to take 64 KiB of an answer.
        max_connections: maximum open connections.
        hang_timeout: how long texts may wait while nothing is computed (`watchdog`); 0: no limit.
        max_restarts: maximum restarts in a row of a server that ended.
        log_format: "text", or "json" for one JSON object per line.
        log_requests: whether texts are logged.
        access_log: whether each request is logged, without texts.
        threads: CPU threads of all workers together; None: one for each core that the process may use.
        engine: "vllm" or "sglang".
        engine_args: further settings of the engine, such as ("max-log-len", "5").
    """

    checkpoint: Checkpoint
    host: str = HOST
    port: int = PORT
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    memory: int | None = None
    dtype: str = "auto"
    kv_cache: bool = False
    kv_cache_dtype: str = "auto"
    token_table: str | None = None
    max_client_batch: int = MAX_CLIENT_BATCH
    max_queue: int = MAX_QUEUE
    max_body: int = MAX_BODY
    clean: bool = True
    long_texts: str = "refuse"
    default_prompt: str | None = None
    prompt_names: bool = True
    normalize: bool = False
    allow_token_ids: bool = False
    instruction: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    key_file: Path | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    startup_timeout: float = STARTUP_TIMEOUT
    shutdown_timeout: float = SHUTDOWN_TIMEOUT
    keep_alive: int = KEEP_ALIVE
    client_timeout: float = CLIENT_TIMEOUT
    max_connections: int = MAX_CONNECTIONS
    hang_timeout: float = HANG_TIMEOUT
    max_restarts: int = MAX_RESTARTS
    log_format: str = "text"
    log_requests: bool = False
    access_log: bool = False
    threads: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    engine: str = "vllm"
    engine_args: tuple[tuple[str, str], ...] = ()
    verbose: bool = False

    @property
    def name(self) -> str:
        """The model name that requests must give."""
        return self.served_model_name or short_name(self.checkpoint.name)

    @property
    def prompt_name(self) -> str | None:
        """The name of the prompt for requests without one; None: no prompt."""
        return (self.checkpoint.trunk.default_prompt if self.default_prompt is None else self.default_prompt) or None

    @property
    def normalized(self) -> bool:
        """Whether vectors have unit length."""
        return self.normalize or self.checkpoint.trunk.normalized

    @property
    def converts_table(self) -> bool:
        """Whether a float token table is converted to INT8 at load."""
        return self.token_table == INT8 and not self.checkpoint.has_int8_table


@dataclass(frozen=True)
class Launch:
    """What will run: `settings` with all choices made."""

    settings: ServerSettings
    target: Target
    choice: kernels.Choice
    port: int
    sizes: fit.Sizes
    plan: plan.Plan

    @property
    def device(self) -> Device:
        """The kind of device: "cpu" or "cuda"."""
        return self.target.kind

    @property
    def dtype(self) -> str:
        """The dtype of the computation, such as "float32"."""
        return self.choice.dtype

    @property
    def max_model_len(self) -> int:
        """The longest text, in tokens."""
        return self.sizes.max_model_len

    @property
    def keeps_cache(self) -> bool:
        """Whether every layer keeps a KV cache, so that a text can be computed over several steps."""
        return _keeps_cache(self.settings)

    @property
    def longest_step(self) -> int:
        """The most tokens that are computed in one step."""
        if self.keeps_cache and not _needs_whole_texts(self.settings.checkpoint):
            return self.sizes.max_num_batched_tokens
        return max(self.sizes.max_num_batched_tokens, self.max_model_len)

    @property
    def forks_engine(self) -> bool:
        """Whether the server forks its engine, so that both share the libraries in memory: on a CPU, with one engine."""
        return _forks_engine(self.settings, self.device)

    @property
    def needed(self) -> int:
        """Bytes that the device must have free. Parallel workers on a CPU share its memory."""
        parts = self.settings.tensor_parallel_size * self.settings.data_parallel_size
        return self.plan.total * (parts if self.device == "cpu" else 1)

    @property
    def token_table(self) -> str:
        """The dtype of the token table in memory: "int8", the checkpoint's 16-bit dtype, or that of the computation."""
        checkpoint = self.settings.checkpoint
        if self.settings.converts_table or checkpoint.has_int8_table:
            return INT8
        if _has_half_table(checkpoint, self.device, self.dtype):
            tables = (stored for name, (_, stored) in checkpoint.shapes().items() if name.endswith("embed_tokens.weight"))
            return plan.HALVES.get(next(tables, ""), self.dtype)
        return self.dtype

    @property
    def has_packed_table(self) -> bool:
        """Whether vLLM holds a second copy of the token table, packed for products."""
        return _has_packed_table(self.settings.checkpoint, self.device)

    @property
    def fits(self) -> bool:
        """Whether the plan fits into the free memory, as far as that is known."""
        return self.target.free is None or self.needed <= self.target.free

    @property
    def width(self) -> int:
        """The length of an untruncated vector."""
        return self.settings.checkpoint.trunk.width

    @property
    def url(self) -> str:
        """The base URL for an openai client on this machine."""
        host = {"0.0.0.0": HOST, "": HOST, "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104
        scheme = "https" if self.settings.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{self.port}/v1" if ":" in host else f"{scheme}://{host}:{self.port}/v1"


def resolve(settings: ServerSettings, target: Target, cpu: kernels.Cpu, port: int, *, served: bool = True) -> Launch:
    """Choose what `settings` leave open, by the checkpoint, the device and `settings.memory`.

    If `target` is a CPU, dtype and kernel depend on `cpu`. `served`: by vLLM's own processes behind HTTP; otherwise vLLM runs
    in the caller's process.

    Raises:
        BadInput: config.json lacks a size, the settings exceed the model or the device, limits contradict each other, or the
            checkpoint overflows the dtype.
    """
    checkpoint = settings.checkpoint
    _check(settings, target)
    choice = chosen(settings, target, cpu)
    dtype = choice.dtype
    float16.check_manifest(checkpoint, dtype, target)
    stored = checkpoint.shapes()
    if settings.converts_table:
        shapes = plan.with_int8_table(stored)
    elif _has_half_table(checkpoint, target.kind, dtype):
        shapes = plan.with_half_table(stored)
    elif _has_packed_table(checkpoint, target.kind):
        shapes = plan.with_packed_table(stored)
    else:
        shapes = stored

    def make(sizes: fit.Sizes) -> plan.Plan:
        return plan.make(
            shapes,
            checkpoint.config,
            dtype=dtype,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            block_size=BLOCK_SIZE[target.kind],
            device=target.kind,
            cache_dtype=settings.kv_cache_dtype,
            keeps_cache=_keeps_cache(settings),
            whole_texts=_needs_whole_texts(checkpoint),
            in_pieces=checkpoint.trunk.is_causal and not _keeps_cache(settings),
            parallel=settings.tensor_parallel_size,
            processes="caller" if not served else "forked" if _forks_engine(settings, target.kind) else "separate",
            gate_tokenizes=served and checkpoint.reranker is not None,
            capability=target.capability,
        )

    sizes = fit.Sizes(
        plan.max_length(checkpoint.trunk, settings.max_model_len, keeps_cache=_keeps_cache(settings)),
        settings.max_num_seqs or min(MAX_NUM_SEQS, settings.max_num_batched_tokens or MAX_NUM_SEQS),
        settings.max_num_batched_tokens or max(MAX_NUM_BATCHED_TOKENS, settings.max_num_seqs or 0),
    )
    if settings.memory is not None:
        fixed = {name for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens") if getattr(settings, name)}
        sizes = fit.fit(settings.memory, sizes, fixed, checkpoint.trunk.context, make)
    launch = Launch(settings, target, choice, port, sizes, make(sizes))
    while (
        settings.memory is None
        and settings.max_model_len is None
        and not launch.fits
        and sizes.max_model_len > SHORTEST_DEFAULT
    ):
        sizes = replace(sizes, max_model_len=max(SHORTEST_DEFAULT, sizes.max_model_len // 2))
        launch = replace(launch, sizes=sizes, plan=make(sizes))
    return launch


def chosen(settings: ServerSettings, target: Target, cpu: kernels.Cpu) -> kernels.Choice:
    """Dtype and kernel: on a GPU bfloat16 or else float16, on a CPU `kernels.choose`; or the dtype that `settings` give."""
    if target.kind == "cuda":
        if settings.dtype != "auto":
            return kernels.Choice(settings.dtype, None, "--dtype")
        if target.has_bfloat16:
            return kernels.Choice("bfloat16", None, "a GPU with bfloat16")
        return kernels.Choice("float16", None, "a GPU without bfloat16")
    return kernels.choose(cpu, int4=settings.checkpoint.is_int4 and settings.engine == "vllm", dtype=settings.dtype)


def _keeps_cache(settings: ServerSettings) -> bool:
    """Whether a KV cache is wanted, or needed: by another engine, by the model's layers, or by one of the engine_args."""
    needed = any(name.replace("_", "-").removeprefix("no-") in NEED_CACHE for name, _ in settings.engine_args)
    return settings.kv_cache or settings.engine != "vllm" or needed or not plan.layers_are_alike(settings.checkpoint.config)


def _needs_whole_texts(checkpoint: Checkpoint) -> bool:
    """Whether vLLM must compute a text in one step: where its vector depends on all states, or a state on later tokens."""
    trunk = checkpoint.trunk
    return trunk.pooling != "last" or not trunk.is_causal


def _forks_engine(settings: ServerSettings, device: Device) -> bool:
    """See `Launch.forks_engine`. The forked engine gets its number of threads from our worker, which has no KV cache."""
    single = settings.tensor_parallel_size == settings.data_parallel_size == 1
    return device == "cpu" and single and not _keeps_cache(settings)


def _has_half_table(checkpoint: Checkpoint, device: Device, dtype: str) -> bool:
    """Whether the plugin keeps a 16-bit token table in 16 bits (`vllm_plugin.half_table`)."""
    return checkpoint.is_int4 and device == "cpu" and dtype == "float32"


def _has_packed_table(checkpoint: Checkpoint, device: Device) -> bool:
    """Whether vLLM holds the token table twice. The plugin prevents that for quantized checkpoints."""
    return device == "cpu" and not checkpoint.is_int4


def _check(settings: ServerSettings, target: Target) -> None:
    """Refuse settings that contradict each other, or that checkpoint or device do not support."""
    checkpoint, trunk = settings.checkpoint, settings.checkpoint.trunk
    if (model_type := checkpoint.config["model_type"]) != trunk.family:
        raise BadInput(
            f"{checkpoint.folder}: vLLM reads model_type {model_type!r} only with the model's own code, which is not run; "
            "quantize the model, and serve that, or embed with --int4"
        )
    if not trunk.is_causal and settings.kv_cache:
        raise BadInput("--kv-cache: attention is bidirectional, so that keys and values of a text never serve another step")
    check_task(settings)
    checkpoint.check_layers()
    tokens, seqs = settings.max_num_batched_tokens, settings.max_num_seqs
    if tokens is not None and seqs is not None and tokens < seqs:
        raise BadInput(f"--max-num-batched-tokens {tokens} is less than one token for each of --max-num-seqs {seqs}")
    if settings.max_queue < settings.max_client_batch:
        raise BadInput(
            f"--max-queue {settings.max_queue} is less than --max-client-batch {settings.max_client_batch}: a request of "
            f"{settings.max_client_batch} texts would be allowed but never admitted; raise the one or lower the other"
        )
    if settings.converts_table and not checkpoint.is_int4:
        raise BadInput(f"{checkpoint.folder}: --token-table {INT8} goes with an INT4 checkpoint; this one is not quantized")
    if settings.default_prompt and settings.default_prompt not in checkpoint.prompts:
        raise BadInput(f"--default-prompt {settings.default_prompt!r}: the model has {', '.join(sorted(checkpoint.prompts))}")
    if target.capability is not None and target.capability < MIN_CAPABILITY:
        raise BadInput(
            f"{target.name} has compute capability {target.capability:g}; INT4 needs {MIN_CAPABILITY:g} (T4) or later"
        )
    if settings.dtype == "bfloat16" and target.kind == "cuda" and not target.has_bfloat16:
        raise BadInput(f"--dtype bfloat16: {target.name} has no bfloat16; use float16")
    if settings.kv_cache_dtype == "fp8" and not target.has_fp8:
        raise BadInput(f"--kv-cache-dtype fp8: {target.name} has no 8-bit floats; an L4, or an RTX 40 or H100, has them")
    hosts.allowed(settings.host, settings.allowed_hosts, has_keys=bool(settings.keys))
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise BadInput("--ssl-certfile and --ssl-keyfile go together")


def check_fits(launch: Launch) -> None:
    """Check that the plan fits the device.

    Raises:
        BadInput: it does not; the message has the plan.
    """
    if launch.fits or launch.target.free is None:
        return
    lines = launch.plan
    raise BadInput(
        f"{launch.target.name} has {gib(launch.target.free)} free, and the plan needs {gib(launch.needed)}: weights "
        f"{gib(lines.weights)}, keys and values {gib(lines.kv_cache)} for {launch.max_model_len} tokens, activations "
        f"{gib(lines.activations)}, the rest {gib(lines.runtime + lines.graphs)}; lower --max-model-len, or let "
        f"--memory choose"
    )
