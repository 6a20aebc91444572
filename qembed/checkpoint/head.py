"""From the states of a text's tokens to its vector: pooling, dense layers, normalization. In float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.checkpoint.embedder import Embedder
from qembed.checkpoint.files import open_tensors
from qembed.checkpoint.modules import Dense
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """A dense layer: weight [outputs, inputs] and bias [outputs] or None, in float32, and a class of torch.nn."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str


@dataclass(frozen=True)
class Head:
    """What follows a model's last norm."""

    pooling: str
    layers: tuple[Layer, ...]
    normalized: bool

    @classmethod
    def of(cls, embedder: Embedder, device: torch.device | str = "cpu") -> Head:
        """Load the dense layers of `embedder`.

        Raises:
            BadInput: a weight cannot be read, or is not finite.
        """
        return cls(embedder.pooling, tuple(_load(dense, device) for dense in embedder.dense), embedder.normalized)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """One state [B, hidden] float32 for each text, from states [B, L, hidden] that are padded on the right.

        `lengths` [B] int64 are the tokens of each text.
        """
        import torch

        if self.pooling == "last":
            return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1].float()
        mask = is_token(lengths, hidden.shape[1])
        return (hidden.float() * mask[..., None]).sum(1) / lengths[:, None]

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """Vectors [n, width] float32 from states [n, hidden] float32, without scaling to unit length."""
        import torch

        for layer in self.layers:
            pooled = torch.nn.functional.linear(pooled, layer.weight.to(pooled.device), _on(layer.bias, pooled.device))
            pooled = getattr(torch.nn, layer.activation)()(pooled)
        return pooled

    def vectors(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The vectors [B, width] float32 of texts, as the model gives them; arguments as for `pool`."""
        import torch

        vectors = self.project(self.pool(hidden, lengths))
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalized else vectors


def is_token(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """[B, longest] bool: which positions are tokens of texts of `lengths` [B] int64, and no padding after them."""
    import torch

    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _load(dense: Dense, device: torch.device | str) -> Layer:
    with open_tensors(dense.file) as opened:
        tensors = {name: opened.get_tensor(name).to(device).float() for name in dense.tensors}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{dense.file}: tensor {name} has a value that is NaN or infinite")
    weight, *bias = tensors.values()
    return Layer(weight, bias[0] if bias else None, dense.activation)
