"""What is asked of a server, and what is decided for it: where it computes, in what, how long a text may be, and the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import short_name
from qembed.checkpoint.int8_table import INT8
from qembed.errors import BadInput
from qembed.sizes import gib
from qembed.vllm import fit, kernels, plan
from qembed.vllm.devices import Device, Target

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
HANG_TIMEOUT = 120.0
MAX_RESTARTS = 5
# vLLM's blocks of 128 tokens on a CPU would leave 32 short sequences holding 4,096 tokens of mostly empty cache.
BLOCK_SIZE: dict[Device, int] = {"cpu": 32, "cuda": 16}
OLDEST_CAPABILITY = 7.5
BFLOAT16_CAPABILITY = 8.0


@dataclass(frozen=True)
class ServerSettings:
    """What is asked for. Lengths in tokens, times in seconds; `port` 0 takes a free one, None leaves the choice to us.

    Attributes:
        token_table: "int8" turns a float table to INT8 while it is loaded; None leaves it as the checkpoint has it.
        memory: bytes that all of it may take; lengths and numbers of sequences that are left open are then chosen to fit.
        kv_cache_dtype: "auto" (what is computed in) or "fp8".
        max_client_batch: texts in one request, at most.
        max_queue: texts waiting and being computed, at most.
        max_body: bytes of a request, at most.
        clean: whether texts are cleaned (`gate.cleaning`).
        truncate: whether a text that is too long is cut, where the request does not say.
        default_prompt: the name of the prompt for requests that name none.
        allow_token_ids: whether token ids are taken in place of texts.
        keys: API keys, one of which a request must give; none: no key is asked for.
        ssl_certfile, ssl_keyfile: both for HTTPS.
        hang_timeout: how long texts may wait while nothing is computed (`watchdog`); 0: as long as it takes.
        max_restarts: how often in a row a server that ended is started again.
        log_format: "text", or "json" for a JSON object a line.
        log_requests: whether texts go into the log.
        engine: "vllm" or "sglang".
        engine_args: further settings of the engine, as ("max-log-len", "5").
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
    kv_cache_dtype: str = "auto"
    token_table: str | None = None
    max_client_batch: int = MAX_CLIENT_BATCH
    max_queue: int = MAX_QUEUE
    max_body: int = MAX_BODY
    clean: bool = True
    truncate: bool = False
    default_prompt: str | None = None
    allow_token_ids: bool = False
    keys: tuple[str, ...] = field(default=(), repr=False)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    startup_timeout: float = STARTUP_TIMEOUT
    shutdown_timeout: float = SHUTDOWN_TIMEOUT
    hang_timeout: float = HANG_TIMEOUT
    max_restarts: int = MAX_RESTARTS
    log_format: str = "text"
    log_requests: bool = False
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
    def makes_table(self) -> bool:
        """Whether the token table has to be turned to INT8 at load."""
        return self.token_table == INT8 and not self.checkpoint.has_int8_table


@dataclass(frozen=True)
class Launch:
    """What will be run: `settings` with nothing left open, on `target`, with `sizes` and within `plan`."""

    settings: ServerSettings
    target: Target
    choice: kernels.Choice
    port: int
    sizes: fit.Sizes
    plan: plan.Plan

    @property
    def device(self) -> Device:
        """What it computes on: "cpu" or "cuda"."""
        return self.target.kind

    @property
    def dtype(self) -> str:
        """What it computes in: "float32", …"""
        return self.choice.dtype

    @property
    def max_model_len(self) -> int:
        """The longest text, in tokens."""
        return self.sizes.max_model_len

    @property
    def needed(self) -> int:
        """Bytes that the device must have free. A CPU's memory is shared by all parallel parts."""
        parts = self.settings.tensor_parallel_size * self.settings.data_parallel_size
        return self.plan.total * (parts if self.device == "cpu" else 1)

    @property
    def token_table(self) -> str:
        """What the token table is held in: "int8", or the checkpoint's 16 bits, or the dtype that is computed in."""
        checkpoint = self.settings.checkpoint
        if self.settings.makes_table or checkpoint.has_int8_table:
            return INT8
        if _keeps_table(checkpoint, self.device, self.dtype):
            held = (stored for name, (_, stored) in checkpoint.shapes().items() if name.endswith("embed_tokens.weight"))
            return plan.HALVES.get(next(held, ""), self.dtype)
        return self.dtype

    @property
    def packs_table(self) -> bool:
        """Whether there is a second copy of the token table, packed for products."""
        return _packs_table(self.settings.checkpoint, self.device)

    @property
    def hidden_size(self) -> int:
        """The length of a whole vector."""
        return plan.size_of(self.settings.checkpoint.config, "hidden_size")

    @property
    def url(self) -> str:
        """Where an openai client on this machine reaches the server."""
        host = {"0.0.0.0": HOST, "": HOST, "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104
        scheme = "https" if self.settings.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{self.port}/v1" if ":" in host else f"{scheme}://{host}:{self.port}/v1"


def resolve(settings: ServerSettings, target: Target, cpu: kernels.Cpu, port: int, *, served: bool = True) -> Launch:
    """Fill in what `settings` leaves open, from the checkpoint, the device and `settings.memory`.

    `cpu` decides about dtype and kernel where `target` is a CPU.

    `served`: by vLLM's own processes, behind HTTP; otherwise vLLM runs in the process that asks.

    Raises:
        BadInput: the checkpoint lacks something that is needed, more is asked than model or device can do, or limits that
            contradict each other.
    """
    checkpoint = settings.checkpoint
    _check(settings, target)
    choice = chosen(settings, target.kind, cpu)
    dtype = choice.dtype
    stored = checkpoint.shapes()
    if settings.makes_table:
        shapes = plan.with_int8_table(stored)
    elif _keeps_table(checkpoint, target.kind, dtype):
        shapes = plan.with_kept_table(stored)
    elif _packs_table(checkpoint, target.kind):
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
            parallel=settings.tensor_parallel_size,
            served=served,
        )

    sizes = fit.Sizes(
        plan.max_length(checkpoint.config, settings.max_model_len),
        settings.max_num_seqs or min(MAX_NUM_SEQS, settings.max_num_batched_tokens or MAX_NUM_SEQS),
        settings.max_num_batched_tokens or max(MAX_NUM_BATCHED_TOKENS, settings.max_num_seqs or 0),
    )
    if settings.memory is not None:
        fixed = {name for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens") if getattr(settings, name)}
        limit = plan.size_of(checkpoint.config, "max_position_embeddings")
        sizes = fit.fit(settings.memory, sizes, fixed, limit, make)
    return Launch(settings, target, choice, port, sizes, make(sizes))


def chosen(settings: ServerSettings, device: Device, cpu: kernels.Cpu) -> kernels.Choice:
    """Dtype and kernel: float16 on a GPU, on a CPU what `kernels.choose` says, unless `settings` ask for another dtype."""
    if device == "cuda":
        return (
            kernels.Choice("float16", None, "a GPU")
            if settings.dtype == "auto"
            else kernels.Choice(settings.dtype, None, "--dtype")
        )
    return kernels.choose(cpu, int4=settings.checkpoint.is_int4 and settings.engine == "vllm", dtype=settings.dtype)


def _keeps_table(checkpoint: Checkpoint, device: Device, dtype: str) -> bool:
    """Whether the plugin leaves a 16-bit token table as it is."""
    return checkpoint.is_int4 and device == "cpu" and dtype == "float32"


def _packs_table(checkpoint: Checkpoint, device: Device) -> bool:
    """Whether vLLM holds the token table twice, which the plugin keeps it from where something is quantized."""
    return device == "cpu" and not checkpoint.is_int4


def _check(settings: ServerSettings, target: Target) -> None:
    checkpoint = settings.checkpoint
    tokens, seqs = settings.max_num_batched_tokens, settings.max_num_seqs
    if tokens is not None and seqs is not None and tokens < seqs:
        raise BadInput(f"--max-num-batched-tokens {tokens} is less than one token for each of --max-num-seqs {seqs}")
    if settings.max_queue < settings.max_client_batch:
        raise BadInput(
            f"--max-queue {settings.max_queue} is less than --max-client-batch {settings.max_client_batch}: a request of "
            f"{settings.max_client_batch} texts would be allowed, and refused for ever; raise the one or lower the other"
        )
    if settings.makes_table and not checkpoint.is_int4:
        raise BadInput(f"{checkpoint.folder}: --token-table {INT8} goes with an INT4 checkpoint; this one is not quantized")
    if settings.default_prompt is not None and settings.default_prompt not in checkpoint.prompts:
        raise BadInput(f"--default-prompt {settings.default_prompt!r}: the model has {', '.join(sorted(checkpoint.prompts))}")
    if target.capability is not None and target.capability < OLDEST_CAPABILITY:
        raise BadInput(
            f"{target.name} has compute capability {target.capability:g}; INT4 needs {OLDEST_CAPABILITY:g} (T4) or later"
        )
    if settings.dtype == "bfloat16" and target.capability is not None and target.capability < BFLOAT16_CAPABILITY:
        raise BadInput(f"--dtype bfloat16: {target.name} has no bfloat16; use float16")
    if settings.kv_cache_dtype == "fp8" and not target.has_fp8:
        raise BadInput(f"--kv-cache-dtype fp8: {target.name} has no 8-bit floats; an L4, or an RTX 40 or H100, has them")
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise BadInput("--ssl-certfile and --ssl-keyfile go together")


def check_fits(launch: Launch) -> None:
    """See that the device has room for the plan.

    Raises:
        BadInput: it has not; the message has the plan.
    """
    free = launch.target.free
    if free is None or launch.needed <= free:
        return
    made = launch.plan
    raise BadInput(
        f"{launch.target.name} has {gib(free)} free, and the plan needs {gib(launch.needed)}: weights "
        f"{gib(made.weights)}, cache {gib(made.kv_cache)} for {launch.max_model_len} tokens, activations "
        f"{gib(made.activations)}, the rest {gib(made.runtime + made.graphs)}; lower --max-model-len, or let "
        f"--memory choose"
    )
