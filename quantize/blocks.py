"""Decoder blocks of Qwen3, Qwen2, Llama and Mistral: their seven linear layers, and how to run a single block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.head import is_token
from qembed.checkpoint.transformers_config import transformers_config
from qembed.errors import BadInput
from qembed.quantize import products

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qembed.quantize.batches import Batch

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
"""The linear layers that read each input. An input has the name of the first of them."""
RMS_NORMS = ("Qwen3RMSNorm", "Qwen2RMSNorm", "LlamaRMSNorm", "MistralRMSNorm")
"""transformers' classes of the norm that `rms_norm` computes."""
NOT_STORED = ".rotary_emb.inv_freq"
"""Suffix of the names of buffers in old Llama checkpoints; the model computes them from its config."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model whose blocks can be quantized; `mlp` is the width of the MLP, `vocabulary` the number of token ids."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    def linear(self, name: str) -> tuple[int, int]:
        """(outputs N, inputs K) of the linear layer `name`, one of LINEARS."""
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


def model_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of `checkpoint`, with PyTorch's fused attention.

    transformers 4 (which AutoAWQ needs) reads rotary settings from `rope_theta` and `rope_scaling` at the top level. For a
    checkpoint of transformers 5, which has them under `rope_parameters`, it would silently use its defaults.
    """
    import transformers

    config = transformers_config(checkpoint)
    config._attn_implementation = "sdpa"
    parameters = checkpoint.config.get("rope_parameters") or {}
    if transformers.__version__.startswith("4.") and "rope_theta" in parameters:
        config.rope_theta = parameters["rope_theta"]
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


class DecoderLayer:
    """A decoder block in transformers' own code on `device`, into which any layer of the model can be loaded.

    `load` loads the tensors of a layer, `run` runs it; `inputs_of` and `add_output` together run one of its two halves. Nothing
    else of the model is in memory. A layer that is loaded in bfloat16 computes its attention and its MLP in bfloat16; the
    residual stream and the norms that read it stay in float32.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Build the block that config.json describes, without weights.

        Raises:
            BadInput: transformers rejects config.json.
        """
        import torch
        from transformers import AutoModel

        try:
            config = model_config(checkpoint)
            layers = config.num_hidden_layers
            self.windows = [_window(config, layer) for layer in range(layers)]
            config.num_hidden_layers = 1
            with torch.device("meta"):
                model = AutoModel.from_config(config, trust_remote_code=False)
            self.rotary: Any = type(model.rotary_emb)(config=config).to(device)
        except Exception as error:  # transformers raises many types for a bad config
            reason = " ".join(str(error).split())
            raise BadInput(
                f"{checkpoint.folder}: transformers rejects config.json: {type(error).__name__}: {reason}"
            ) from error
        self.device = device
        self.is_causal = checkpoint.trunk.is_causal
        self.module: Any = model.layers[0].eval()
        products.use_in(self.module)
        _use_rms_norm(self.module)
        self.window: int | None = None
        self.dtype = torch.float32

    def load(self, tensors: Mapping[str, torch.Tensor], layer: int = 0, dtype: torch.dtype | None = None) -> None:
        """Load the `tensors` of `layer`, named as in the checkpoint without the layer's prefix.

        `dtype` is that of attention and MLP: float32 by default, or bfloat16, for calibration (`products.calibration_dtype`).

        Raises:
            BadInput: a tensor is missing, unexpected, or has another shape than in the architecture.
        """
        import torch

        self.dtype = dtype or torch.float32
        converted = {
            name: tensor.to(self.device, self.dtype if name.startswith(("self_attn.", "mlp.")) else torch.float32)
            for name, tensor in tensors.items()
        }
        try:
            self.module.load_state_dict(converted, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"the tensors of a layer do not match its architecture: {reason}") from error
        self.window = self.windows[layer]

    def inputs_of(self, name: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The inputs of "self_attn.o_proj" [B, L, heads · head_dim] or "mlp.down_proj" [B, L, mlp].

        `hidden` are the hidden states before the block for o_proj, and after its attention for down_proj. The linear layer
        itself is not computed: an identity takes its place.
        """
        from torch import nn

        parent = self.module.self_attn if name == "self_attn.o_proj" else self.module.mlp
        attribute = name.rpartition(".")[2]
        linear = getattr(parent, attribute)
        setattr(parent, attribute, nn.Identity())
        try:
            if parent is self.module.mlp:
                inputs: torch.Tensor = parent(self.module.post_attention_layernorm(hidden).to(self.dtype))
                return inputs
            return self._attention(hidden, batch)
        finally:
            setattr(parent, attribute, linear)

    def add_output(self, name: str, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """`hidden` [B, L, hidden] plus the output of the linear layer `name` for its `inputs` [B, L, K]."""
        output: torch.Tensor = self.linear(name)(inputs.to(self.dtype))
        return hidden + output

    def run(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The hidden states [B, L, hidden] after the block, from those before it."""
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            hidden = self.add_output(name, hidden, self.inputs_of(name, hidden, batch))
        return hidden

    def run_with(self, tensors: Mapping[str, torch.Tensor], layer: int, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`run` with `tensors` (as for `load`) instead of the loaded ones; differentiable in them and in `hidden`."""
        from torch.func import functional_call

        self.window = self.windows[layer]
        arguments = {
            "hidden_states": hidden,
            "position_embeddings": self.rotary(hidden, batch.positions.to(self.device)),
            "attention_mask": self._mask(batch),
        }
        result: Any = functional_call(self.module, dict(tensors), (), arguments)
        return result[0] if isinstance(result, tuple) else result

    def linear(self, name: str) -> nn.Linear:
        """The linear layer `name`, one of LINEARS, of the loaded layer."""
        linear: nn.Linear = self.module.get_submodule(name)
        return linear

    def _attention(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The output of the attention, without the residual."""
        normalized = self.module.input_layernorm(hidden).to(self.dtype)
        arguments = {
            "hidden_states": normalized,
            "position_embeddings": self.rotary(normalized, batch.positions.to(self.device)),
            "attention_mask": self._mask(batch),
        }
        result: Any = self.module.self_attn(**arguments)
        return result[0] if isinstance(result, tuple) else result

    def _mask(self, batch: Batch) -> torch.Tensor | None:
        """The attention mask [B, 1, L, L] bool (query, key) of the loaded layer; None is plain causal attention."""
        if not self.is_causal:
            lengths = batch.ends.to(self.device) + 1
            length = batch.ids.shape[1]
            return is_token(lengths, length)[:, None, None].expand(-1, -1, length, -1)
        if self.window is None or batch.ids.shape[1] <= self.window:
            return None if batch.visible is None else batch.visible.to(self.device)
        positions = batch.positions.to(self.device)
        mask = window_mask(positions, self.window)
        return mask if batch.visible is None else mask & batch.visible.to(self.device)


def window_mask(positions: torch.Tensor, window: int) -> torch.Tensor:
    """The mask of a sliding window for `positions` [B, L] int64: each token attends to the last `window`, itself included.

    Returns:
        Mask [B, 1, L, L] bool (query, key).
    """
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    return (distance >= 0) & (distance < window)


def _window(config: Any, layer: int) -> int | None:
    """The length of the sliding window of `layer` in a transformers config; None: it attends to all previous tokens."""
    if (types := getattr(config, "layer_types", None)) is not None:
        sliding = types[layer] == "sliding_attention"
    else:
        sliding = getattr(config, "use_sliding_window", True) and layer >= getattr(config, "max_window_layers", 0)
    return getattr(config, "sliding_window", None) if sliding else None


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square normalization of `hidden` [..., d] with `weight` [d]: in float32, returned in the dtype of `hidden`.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    import torch

    values = hidden.float()
    if torch.is_grad_enabled():
        return torch.nn.functional.rms_norm(values, weight.shape, weight.float(), epsilon).to(hidden.dtype)
    # torch composes its own of single operations too, but of more: half to a fifth of the time.
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    inverse = length.square_().div_(values.shape[-1]).add_(epsilon).rsqrt_()
    return (values * inverse).mul_(weight.float()).to(hidden.dtype)


def _use_rms_norm(module: torch.nn.Module) -> None:
    """Make the norms of `module` compute with `rms_norm`, which takes a quarter of the time of transformers' own."""
    from torch import nn

    class RMSNorm(nn.Module):
        weight: torch.Tensor
        variance_epsilon: float

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return rms_norm(hidden, self.weight, self.variance_epsilon)

    for submodule in module.modules():
        if type(submodule).__name__ in RMS_NORMS:
            submodule.__class__ = RMSNorm
