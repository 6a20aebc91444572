"""What is looked at before the work begins: that a checkpoint is one that can be quantized, down to each of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qembed.checkpoint.awq_layout import PACK
from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.quantize.blocks import FAMILIES, LINEARS, NOT_STORED, Architecture, DecoderLayer
from qembed.quantize.table import half

GROUP_SIZES = (32, 64, 128)
DTYPES = ("F16", "BF16", "F32")
SCAN_VALUES = 2**24
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
OTHER_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def shape_of(checkpoint: Checkpoint, group_size: int) -> Architecture:
    """The sizes of `checkpoint`, after looking whether its blocks can be quantized in groups of `group_size`.

    Raises:
        BadInput: already quantized, another architecture, nonsense in config.json, or a size that group size or packing cannot
            take; or a tensor that the architecture has is missing, of another shape or dtype, or is one too many.
    """
    config, folder = checkpoint.config, checkpoint.folder
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise BadInput(f"{folder}: already quantized ({method}); name the original checkpoint")
    shape = sizes_of(checkpoint)
    for name in LINEARS:
        outputs, inputs = shape.linear(name)
        if inputs % group_size:
            fitting = [str(size) for size in GROUP_SIZES if not any(shape.linear(one)[1] % size for one in LINEARS)]
            hint = f"--group-size {' or '.join(fitting)} would fit" if fitting else "no group size fits this model"
            raise BadInput(f"{folder}: {name} has {inputs} inputs, which groups of {group_size} do not divide; {hint}")
        if outputs % PACK:
            raise BadInput(f"{folder}: {name} has {outputs} outputs, which packing by {PACK} does not divide")
    _check_tensors(checkpoint, shape)
    return shape


def sizes_of(checkpoint: Checkpoint) -> Architecture:
    """The sizes that config.json names, of one of FAMILIES, after looking whether they make sense together.

    Raises:
        BadInput: another architecture, or nonsense.
    """
    config, folder = checkpoint.config, checkpoint.folder
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BadInput(f"{folder}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    for key in SIZES:
        if key not in config:
            raise BadInput(f"{folder}: config.json does not say {key}")
    for key in (*SIZES, *OTHER_SIZES):
        value = config.get(key)
        if (key in SIZES or value is not None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadInput(f"{folder}: config.json: {key} is {value!r}, not a positive whole number")
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise BadInput(f"{folder}: config.json: {key} is {value!r}, not a positive number")
    if config.get("is_causal") is False:
        raise BadInput(f"{folder}: attends in both directions (is_causal is false); only causal decoders are supported")
    heads = config["num_attention_heads"]
    shape = Architecture(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or {"qwen3": 32, "qwen2": 32, "mistral": 8}.get(family, heads),
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )
    if shape.heads % shape.kv_heads:
        raise BadInput(f"{folder}: config.json: {shape.kv_heads} key-value heads do not divide {shape.heads} heads")
    return shape


def check_values(checkpoint: Checkpoint, on_tensor: Callable[[int, int], None] = lambda *_: None) -> None:
    """Look at every value once, so that a bad one does not end a long run. `on_tensor` gets (tensors done, tensors in all).

    Raises:
        BadInput: a value is NaN or infinite, or too great for float16; the tensor is named.
    """
    stored = checkpoint.shapes()
    for number, name in enumerate(sorted(stored), 1):
        size = stored[name][0]
        for block in checkpoint.row_blocks(name, max(1, SCAN_VALUES // max(1, math.prod(size[1:])))) if size else ():
            half(name, block)
        on_tensor(number, len(stored))


def _check_tensors(checkpoint: Checkpoint, shape: Architecture) -> None:
    import torch

    stored, prefix = checkpoint.shapes(), checkpoint.prefix
    for name, path in checkpoint.files.items():
        if name not in stored:
            raise BadInput(f"{checkpoint.folder}: tensor {name} is missing: the index says that it is in {path.name}")
        if stored[name][1] not in DTYPES and not name.endswith(NOT_STORED):
            raise BadInput(f"{checkpoint.folder}: tensor {name} is {stored[name][1]}; weights are read as {', '.join(DTYPES)}")
    table = [shape.vocabulary, shape.hidden]
    _has(checkpoint, stored, prefix + "embed_tokens.weight", table)
    _has(checkpoint, stored, prefix + "norm.weight", [shape.hidden])
    if "lm_head.weight" in stored:
        _has(checkpoint, stored, "lm_head.weight", table)
    for layer in range(shape.layers):
        for name in LINEARS:
            _has(checkpoint, stored, f"{prefix}layers.{layer}.{name}.weight", list(shape.linear(name)))
    expected: dict[str, Any] = DecoderLayer(checkpoint, torch.device("cpu")).module.state_dict()
    for layer in range(shape.layers):
        for name, tensor in expected.items():
            _has(checkpoint, stored, f"{prefix}layers.{layer}.{name}", list(tensor.shape))
    known = {f"{prefix}layers.{layer}.{name}" for layer in range(shape.layers) for name in expected}
    for name in checkpoint.files:
        if ".layers." in f".{name}" and name not in known and not name.endswith(NOT_STORED):
            raise BadInput(
                f"{checkpoint.folder}: tensor {name} is none that {checkpoint.config['model_type']} has by config.json"
            )


def _has(checkpoint: Checkpoint, stored: dict[str, tuple[list[int], str]], name: str, size: list[int]) -> None:
    if name not in checkpoint.files:
        raise BadInput(f"{checkpoint.folder}: tensor {name} is missing")
    if stored[name][0] != size:
        raise BadInput(f"{checkpoint.folder}: tensor {name} has shape {stored[name][0]}, config.json says {size}")
