"""What is asked of a server, and the same in vLLM's own words: arguments and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qembed.checkpoint import Checkpoint, short_name
from qembed.errors import BadInput
from qembed.serve import plan
from qembed.serve.machine import Device
from qembed.token_table import INT8, QUANT_METHOD

HOST = "127.0.0.1"
PORT = 8000
MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 2048
STARTUP_TIMEOUT = 600.0
SHUTDOWN_TIMEOUT = 10
# vLLM's blocks of 128 tokens on a CPU would leave 32 short sequences holding 4,096 tokens of mostly empty cache.
BLOCK_SIZE: dict[Device, int] = {"cpu": 32, "cuda": 16}
STOCK_CPU_KERNEL = "CPUWNA16LinearKernel"


@dataclass(frozen=True)
class Settings:
    """What is asked for. Lengths in tokens, times in seconds; `port` 0 takes a free one, None leaves the choice to us.

    `token_table` "int8" turns a float table to INT8 while it is loaded; None leaves it as the checkpoint has it.
    """

    checkpoint: Checkpoint
    host: str = HOST
    port: int = PORT
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    dtype: str = "auto"
    token_table: str | None = None
    startup_timeout: float = STARTUP_TIMEOUT
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
    """What will be run: `settings` with nothing left open, on `device`, within `plan`."""

    settings: Settings
    device: Device
    dtype: str
    port: int
    max_model_len: int
    plan: plan.Plan

    @property
    def token_table(self) -> str:
        """What the token table is held in: "int8", or the dtype that is computed in."""
        return INT8 if self.settings.makes_table or self.settings.checkpoint.has_int8_table else self.dtype

    @property
    def hidden_size(self) -> int:
        """The length of a whole vector."""
        return plan.size_of(self.settings.checkpoint.config, "hidden_size")

    @property
    def url(self) -> str:
        """Where an openai client on this machine reaches the server."""
        host = {"0.0.0.0": HOST, "": HOST, "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104
        return f"http://[{host}]:{self.port}/v1" if ":" in host else f"http://{host}:{self.port}/v1"


def resolve(settings: Settings, device: Device, best_dtype: str, port: int) -> Launch:
    """Fill in what `settings` leaves open, from the checkpoint and from the machine: its `device`, its `best_dtype`.

    Raises:
        BadInput: the checkpoint lacks something that is needed, or more is asked than the model can do.
    """
    checkpoint = settings.checkpoint
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise BadInput(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} is less than one token for each of "
            f"--max-num-seqs {settings.max_num_seqs}"
        )
    if settings.makes_table and not checkpoint.is_int4:
        raise BadInput(f"{checkpoint.folder}: --token-table {INT8} goes with an INT4 checkpoint; this one is not quantized")
    length = plan.max_length(checkpoint.config, settings.max_model_len)
    dtype = best_dtype if settings.dtype == "auto" else settings.dtype
    shapes = checkpoint.shapes()
    planned = plan.make(
        plan.with_int8_table(shapes) if settings.makes_table else shapes,
        checkpoint.config,
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=BLOCK_SIZE[device],
    )
    return Launch(settings, device, dtype, port, length, planned)


def arguments(launch: Launch) -> list[str]:
    """The arguments of vLLM's OpenAI server."""
    settings = launch.settings
    overrides: dict[str, object] = {
        "is_matryoshka": True,
        "matryoshka_dimensions": plan.dimensions(launch.hidden_size),
    }
    if settings.makes_table:
        stored = settings.checkpoint.config["quantization_config"]
        overrides["quantization_config"] = {**stored, "quant_method": QUANT_METHOD, "token_table": INT8}
    chosen = [
        *("--model", str(settings.checkpoint.folder.resolve())),
        *("--served-model-name", settings.name),
        *("--host", settings.host),
        *("--port", str(launch.port)),
        *("--runner", "pooling"),
        *("--convert", "embed"),
        *("--load-format", "safetensors"),
        *("--dtype", launch.dtype),
        *("--max-model-len", str(launch.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--max-num-batched-tokens", str(settings.max_num_batched_tokens)),
        *("--block-size", str(BLOCK_SIZE[launch.device])),
        *("--kv-cache-memory-bytes", str(launch.plan.kv_cache)),
        *("--hf-overrides", json.dumps(overrides)),
        *("--shutdown-timeout", str(SHUTDOWN_TIMEOUT)),
        # Texts seldom share a first block, and a vector should not depend on which text came before.
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if launch.device == "cpu":
        # Compiled code needs a C++ compiler on the machine, and half a minute more at every start (85 s instead of 33 to 60).
        chosen.append("--enforce-eager")
    return chosen


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
    if launch.device == "cpu":
        # Left to itself vLLM keeps a core back for its scheduler, which on two cores is half of the machine.
        chosen.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        # It would overrule the planned cache.
        chosen.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if _needs_own_kernel(launch):
            disabled = [name for name in chosen.get("VLLM_DISABLED_KERNELS", "").split(",") if name]
            chosen["VLLM_DISABLED_KERNELS"] = ",".join(dict.fromkeys([*disabled, STOCK_CPU_KERNEL]))
    return chosen


def _needs_own_kernel(launch: Launch) -> bool:
    """Whether the INT4 kernel must be the plugin's: vLLM's own one for CPUs knows no float32."""
    return launch.settings.checkpoint.is_int4 and launch.dtype == "float32"
