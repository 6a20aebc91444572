"""Decoder blocks with the seven linears of Qwen3, Qwen2, Llama and Mistral: which they are, and how to run one by itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput
from qembed.packing import PACK

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INPUTS = {
    "self_attn.q_proj": LINEARS[0:3],
    "self_attn.o_proj": LINEARS[3:4],
    "mlp.gate_proj": LINEARS[4:6],
    "mlp.down_proj": LINEARS[6:7],
}
"""The linears that read the same input, under the name of the first."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model whose blocks can be quantized."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    def linear(self, name: str) -> tuple[int, int]:
        """(outputs N, inputs K) of one of LINEARS."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = (
            (query, self.hidden),
            (key, self.hidden),
            (key, self.hidden),
            (self.hidden, query),
            (self.mlp, self.hidden),
            (self.mlp, self.hidden),
            (self.hidden, self.mlp),
        )
        return dict(zip(LINEARS, sizes, strict=True))[name]


def shape_of(checkpoint: Checkpoint, group_size: int) -> Shape:
    """The sizes of `checkpoint`, after looking whether its blocks can be quantized in groups of `group_size`.

    Raises:
        BadInput: already quantized, another architecture, or a size that group size or packing cannot take; or a tensor that
            config.json promises is missing or of another shape.
    """
    config, folder = checkpoint.config, checkpoint.folder
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise BadInput(f"{folder}: already quantized ({method}); name the original checkpoint")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BadInput(f"{folder}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    try:
        shape = Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
        )
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder}: config.json does not say {error}") from error
    for name in LINEARS:
        outputs, inputs = shape.linear(name)
        if inputs % group_size:
            raise BadInput(f"{folder}: {name} has {inputs} inputs, which groups of {group_size} do not divide")
        if outputs % PACK:
            raise BadInput(f"{folder}: {name} has {outputs} outputs, which packing by {PACK} does not divide")
    _check_tensors(checkpoint, shape)
    return shape


def _check_tensors(checkpoint: Checkpoint, shape: Shape) -> None:
    stored = checkpoint.shapes()
    expected = {"embed_tokens.weight": [shape.vocabulary, shape.hidden], "norm.weight": [shape.hidden]}
    for layer in range(shape.layers):
        for name in LINEARS:
            expected[f"layers.{layer}.{name}.weight"] = list(shape.linear(name))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"layers.{layer}.{norm}.weight"] = [shape.hidden]
    for name, size in expected.items():
        full = checkpoint.prefix + name
        if full not in stored:
            raise BadInput(f"{checkpoint.folder}: tensor {full} is missing")
        found, dtype = stored[full]
        if found != size:
            raise BadInput(f"{checkpoint.folder}: tensor {full} has shape {found}, config.json says {size}")
        if dtype not in ("F16", "BF16", "F32"):
            raise BadInput(f"{checkpoint.folder}: tensor {full} is {dtype}; weights are read as F16, BF16 or F32")


class Block:
    """One decoder block at a time, with transformers' own code for it, in float32 on `device`.

    `load` puts a layer's tensors in; `run` sends hidden states through. Nothing else of the model is ever in memory.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        config.num_hidden_layers = 1
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        self.device = device
        self.module: Any = model.layers[0].eval()
        self.rotary: Any = type(model.rotary_emb)(config=config).to(device)
        self.final_norm: Any = model.norm
        self._takes = inspect.signature(self.module.forward).parameters

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use the `tensors` of a layer, named as in the checkpoint without the layer's own prefix, as float32.

        Raises:
            BadInput: they are not those that the architecture has.
        """
        import torch

        placed = {name: tensor.to(self.device, torch.float32) for name, tensor in tensors.items()}
        try:
            self.module.load_state_dict(placed, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"the tensors of a layer are not those of its architecture: {reason}") from error

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, L, hidden] after the block; each row stands at positions 0 … L − 1, with causal attention."""
        import torch

        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        arguments = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self.rotary(hidden, positions),
        }
        with torch.no_grad():
            result = self.module(hidden, **{name: value for name, value in arguments.items() if name in self._takes})
        after: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return after

    def linear(self, name: str) -> nn.Linear:
        """One of LINEARS of the layer that is loaded."""
        linear: nn.Linear = self.module.get_submodule(name)
        return linear

    @contextmanager
    def inputs_to(self, receive: Any) -> Iterator[None]:
        """Within the context, `receive(name, x)` is called with what each of INPUTS reads: x [B, L, K] float32."""
        handles = []
        for name in INPUTS:

            def hook(_module: Any, arguments: tuple[Any, ...], name: str = name) -> None:
                receive(name, arguments[0])

            handles.append(self.linear(name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square normalisation of `hidden` [..., d] with `weight` [d] (Zhang and Sennrich 2019)."""
    import torch

    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, epsilon)
