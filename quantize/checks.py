"""Pre-flight checks: supported architecture, expected tensors, and every value finite in float16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qembed.checkpoint.awq_layout import PACK
from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.quantize.blocks import LINEARS, NOT_STORED, Architecture, DecoderLayer
from qembed.quantize.table import half

GROUP_SIZES = (32, 64, 128)
DTYPES = ("F16", "BF16", "F32")
SCAN_VALUES = 2**24
"""Values that `check_values` reads at a time."""
REQUIRED_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def shape_of(checkpoint: Checkpoint, group_size: int) -> Architecture:
    """Check that `checkpoint` can be quantized in groups of `group_size`; returns its sizes.

    Raises:
        BadInput: the checkpoint is already quantized or of an unsupported architecture; config.json is invalid; a size does
            not fit the group size or the packing; or a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    config, folder = checkpoint.config, checkpoint.folder
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise BadInput(f"{folder}: already quantized ({method}); give the original checkpoint")
    shape = sizes_of(checkpoint)
    for name in LINEARS:
        outputs, inputs = shape.linear(name)
        if inputs % group_size:
            fitting = [str(size) for size in GROUP_SIZES if not any(shape.linear(linear)[1] % size for linear in LINEARS)]
            hint = f"--group-size {' or '.join(fitting)} would fit" if fitting else "no group size fits this model"
            raise BadInput(f"{folder}: {name} has {inputs} inputs, not a multiple of the group size {group_size}; {hint}")
        if outputs % PACK:
            raise BadInput(f"{folder}: {name} has {outputs} outputs, not a multiple of {PACK}, which packing needs")
    _check_tensors(checkpoint, shape)
    return shape


def sizes_of(checkpoint: Checkpoint) -> Architecture:
    """The sizes in config.json, checked for consistency.

    Raises:
        BadInput: the checkpoint cannot be described (`checkpoint.trunk`), or a value is missing or invalid.
    """
    config, folder, family = checkpoint.config, checkpoint.folder, checkpoint.trunk.family
    for key in REQUIRED_SIZES:
        if key not in config:
            raise BadInput(f"{folder}: config.json: {key} is missing")
    for key in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        if (key in REQUIRED_SIZES or value is not None) and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise BadInput(f"{folder}: config.json: {key} is {value!r}, not a positive integer")
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise BadInput(f"{folder}: config.json: {key} is {value!r}, not a positive number")
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
    """Check that every value is finite in float16, so that a bad one cannot end a long run; reads all tensors once.

    Calls `on_tensor` with (tensors done, tensors in all).

    Raises:
        BadInput: a value is NaN, infinite, or exceeds the range of float16; the message names the tensor.
    """
    stored = checkpoint.shapes()
    for number, name in enumerate(sorted(stored), 1):
        size = stored[name][0]
        if size:
            rows = max(1, SCAN_VALUES // max(1, math.prod(size[1:])))
            for block in checkpoint.row_blocks(name, rows):
                half(name, block)
        on_tensor(number, len(stored))


def _check_tensors(checkpoint: Checkpoint, shape: Architecture) -> None:
    """Raise BadInput unless names, shapes and dtypes of the tensors are those of the architecture."""
    import torch

    stored, prefix = checkpoint.shapes(), checkpoint.prefix
    for name, path in checkpoint.files.items():
        if name not in stored:
            raise BadInput(f"{checkpoint.folder}: tensor {name} is missing from {path.name}, where the index places it")
        if stored[name][1] not in DTYPES and not name.endswith(NOT_STORED):
            raise BadInput(f"{checkpoint.folder}: tensor {name} is {stored[name][1]}; supported dtypes are {', '.join(DTYPES)}")
    table = [shape.vocabulary, shape.hidden]
    _check_shape(checkpoint, stored, prefix + "embed_tokens.weight", table)
    _check_shape(checkpoint, stored, prefix + "norm.weight", [shape.hidden])
    if "lm_head.weight" in stored:
        _check_shape(checkpoint, stored, "lm_head.weight", table)
    for layer in range(shape.layers):
        for name in LINEARS:
            _check_shape(checkpoint, stored, f"{prefix}layers.{layer}.{name}.weight", list(shape.linear(name)))
    expected: dict[str, Any] = DecoderLayer(checkpoint, torch.device("cpu")).module.state_dict()
    for layer in range(shape.layers):
        for name, tensor in expected.items():
            _check_shape(checkpoint, stored, f"{prefix}layers.{layer}.{name}", list(tensor.shape))
    known = {f"{prefix}layers.{layer}.{name}" for layer in range(shape.layers) for name in expected}
    for name in checkpoint.files:
        if ".layers." in f".{name}" and name not in known and not name.endswith(NOT_STORED):
            raise BadInput(
                f"{checkpoint.folder}: tensor {name} is unexpected: {checkpoint.config['model_type']} has none by config.json"
            )


def _check_shape(checkpoint: Checkpoint, stored: dict[str, tuple[list[int], str]], name: str, size: list[int]) -> None:
    if name not in checkpoint.files:
        raise BadInput(f"{checkpoint.folder}: tensor {name} is missing")
    if stored[name][0] != size:
        raise BadInput(f"{checkpoint.folder}: tensor {name} has shape {stored[name][0]}, config.json says {size}")
