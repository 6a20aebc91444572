"""The decoder layers of Qwen3, Qwen2, Llama and Mistral: their seven linears, and a single layer that runs by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.quantize import products

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qembed.quantize.batches import Batch

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
"""Linears that read the same input, by the name of the first."""
NOT_STORED = ".rotary_emb.inv_freq"
"""Suffix of buffers in old Llama checkpoints, which the model computes from its config."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model whose layers can be quantized."""

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


def model_config(checkpoint: Checkpoint) -> Any:
    """transformers' config object for `checkpoint`, with PyTorch's fused attention.

    transformers 4 (which AutoAWQ needs) reads rotary settings from `rope_theta` and `rope_scaling` at the top level. For a
    checkpoint of transformers 5, which has them under `rope_parameters`, it would silently use its defaults.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = "sdpa"
    parameters = checkpoint.config.get("rope_parameters") or {}
    if transformers.__version__.startswith("4.") and "rope_theta" in parameters:
        config.rope_theta = parameters["rope_theta"]
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


class DecoderLayer:
    """A single decoder layer, computed by transformers' own code, in float32 on `device`.

    `load` sets the layer's tensors; `attend` and `feed` compute its two halves, `run` both. Nothing else of the model is in
    memory.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Create the layer that config.json describes, without weights.

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
        except Exception as error:  # an invalid config can raise any exception
            reason = " ".join(str(error).split())
            raise BadInput(
                f"{checkpoint.folder}: transformers does not take config.json: {type(error).__name__}: {reason}"
            ) from error
        self.device = device
        self.module: Any = model.layers[0].eval()
        products.use_in(self.module)
        self.window: int | None = None

    def load(self, tensors: Mapping[str, torch.Tensor], layer: int = 0) -> None:
        """Set the `tensors` of `layer`, named as in the checkpoint without the layer's prefix; they are converted to float32.

        Raises:
            BadInput: names or shapes differ from the architecture's.
        """
        import torch

        state = {name: tensor.to(self.device, torch.float32) for name, tensor in tensors.items()}
        try:
            self.module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"the tensors of a layer are not those of its architecture: {reason}") from error
        self.window = self.windows[layer]

    def attend(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, hidden] after attention, given those before the layer."""
        return hidden + self._attention(hidden, batch)

    def feed(self, middle: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, given those after attention."""
        return middle + self.module.mlp(self.module.post_attention_layernorm(middle))

    def read_by(self, name: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Inputs of "self_attn.o_proj" [B, L, heads · head_dim] or "mlp.down_proj" [B, L, mlp].

        `hidden` are the hidden states before the layer for o_proj, those after attention for down_proj.
        """
        from torch import nn

        part = self.module.self_attn if name == "self_attn.o_proj" else self.module.mlp
        last = name.rpartition(".")[2]
        linear = getattr(part, last)
        setattr(part, last, nn.Identity())
        try:
            if part is self.module.mlp:
                read: torch.Tensor = part(self.module.post_attention_layernorm(hidden))
                return read
            return self._attention(hidden, batch)
        finally:
            setattr(part, last, linear)

    def run(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, hidden] after the layer, given those before it."""
        return self.feed(self.attend(hidden, batch))

    def compute(self, tensors: Mapping[str, torch.Tensor], layer: int, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states after `layer` with `tensors` (named as for `load`), differentiable in them and in `hidden`."""
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
        """One of LINEARS of the loaded layer."""
        linear: nn.Linear = self.module.get_submodule(name)
        return linear

    def _attention(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        arguments = {
            "hidden_states": self.module.input_layernorm(hidden),
            "position_embeddings": self.rotary(hidden, batch.positions.to(self.device)),
            "attention_mask": self._mask(batch),
        }
        result: Any = self.module.self_attn(**arguments)
        return result[0] if isinstance(result, tuple) else result

    def _mask(self, batch: Batch) -> torch.Tensor | None:
        if self.window is None or batch.ids.shape[1] <= self.window:
            return None if batch.visible is None else batch.visible.to(self.device)
        positions = batch.positions.to(self.device)
        seen = window_mask(positions, self.window)
        return seen if batch.visible is None else seen & batch.visible.to(self.device)


def window_mask(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Attention mask of a sliding window: each of `positions` [B, L] int64 attends to the last `window`, itself included.

    Returns:
        Mask [B, 1, L, L] bool (query, key).
    """
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    return (distance >= 0) & (distance < window)


def _window(config: Any, layer: int) -> int | None:
    """Sliding window of `layer` according to transformers' config; None: full attention."""
    if (types := getattr(config, "layer_types", None)) is not None:
        slides = types[layer] == "sliding_attention"
    else:
        slides = getattr(config, "use_sliding_window", True) and layer >= getattr(config, "max_window_layers", 0)
    return getattr(config, "sliding_window", None) if slides else None


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square normalisation of `hidden` [..., d] with `weight` [d] (Zhang and Sennrich 2019)."""
    import torch

    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, epsilon)
