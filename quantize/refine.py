"""The optional last stage (`--refine`): scales and norm weights are tuned by gradient descent to the original's vectors.

Layer-wise quantization keeps each layer close to the original, but what matters is the angle between the final vectors. Weights
and zero points are integers and stay; scales and norm weights are the only parameters of the format that can change slightly.

Memory stays close to that of one layer: the forward pass keeps the hidden states between layers, and the backward pass
recomputes each layer from them (gradient checkpointing, Chen et al. 2016, https://arxiv.org/abs/1604.06174). Four float32
numbers per scale grow with the model: 13% of the size of INT4 weights in groups of 128.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.awq_layout import unpack
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import DecoderLayer, rms_norm
from qembed.quantize.hidden import Stream
from qembed.quantize.parts import REFINED, Parts

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)
WARM_UP_STEPS = 10

Tensors = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Model:
    """An INT4 model whose layers are in `parts`, under the tensor names of a checkpoint.

    Attributes:
        block: computes a layer.
        prefix: of the checkpoint's tensor names.
        layers: number of layers.
        parts: holds the layers.
        final_norm: [hidden] float32, not tuned.
        epsilon: of the final norm.
    """

    block: DecoderLayer
    prefix: str
    layers: int
    parts: Parts
    final_norm: torch.Tensor
    epsilon: float

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The stored tensors of a layer, on the block's device, named without the layer's prefix."""
        tensors, _ = self._part(layer)
        start = f"{self.prefix}layers.{layer}."
        return {name.removeprefix(start): tensor.to(self.block.device) for name, tensor in tensors.items()}

    def replace(self, layer: int, changed: Tensors) -> None:
        """Replace stored tensors by `changed`, named as `read` names them."""
        tensors, notes = self._part(layer)
        start = f"{self.prefix}layers.{layer}."
        self.parts.write(f"layer-{layer:03d}", {**tensors, **{start + name: value for name, value in changed.items()}}, notes)

    def _part(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        found = self.parts.read(f"layer-{layer:03d}")
        if found is None:
            raise ValueError(f"layer {layer} is not finished")
        return found


def refine(
    model: Model,
    start: Stream,
    wanted: Sequence[torch.Tensor],
    *,
    epochs: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Tune the scales and norm weights of `model` in its parts, so that its vectors approach `wanted`.

    The tuned tensors are written to a part of their own first and then into the layers, so that a run that is interrupted there
    ends with the same bytes when resumed.

    Args:
        model: see there.
        start: the hidden states before the first layer.
        wanted: the original model's vectors [V, hidden] of each batch, of any length, at the positions of `Batch.last`.
        epochs: passes over the batches.
        seed: of their order.
        learning_rate: of Adam (Kingma and Ba 2015); changes are relative to a tensor's own values.
        on_step: called with (finished steps, all steps).
    """
    if REFINED not in model.parts:
        tuned = _tune(model, start, wanted, epochs, seed, learning_rate, on_step)
        model.parts.write(REFINED, {f"{layer}.{name}": value for (layer, name), value in tuned.items()}, {})
    found = model.parts.read(REFINED)
    for layer in range(model.layers):
        of_layer = f"{layer}."
        changed = {
            name.removeprefix(of_layer): value for name, value in (found or ({}, {}))[0].items() if name.startswith(of_layer)
        }
        model.replace(layer, changed)


def _tune(
    model: Model,
    start: Stream,
    wanted: Sequence[torch.Tensor],
    epochs: int,
    seed: int,
    learning_rate: float,
    on_step: Callable[[int, int], None],
) -> dict[tuple[int, str], torch.Tensor]:
    """The tuned tensors, float16 on the CPU, by layer and name."""
    import torch

    values = [tunable(model.read(layer)) for layer in range(model.layers)]
    moved = [{name: torch.zeros_like(value, requires_grad=True) for name, value in layer.items()} for layer in values]
    steps = epochs * len(start.batches)
    optimizer = torch.optim.Adam([tensor for layer in moved for tensor in layer.values()], lr=learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    draw = random.Random(seed)
    order = [number for _ in range(epochs) for number in draw.sample(range(len(start.batches)), len(start.batches))]
    for done, number in enumerate(order, 1):
        optimizer.zero_grad()
        _descend(model, values, moved, start.batches[number], start.hidden[number], wanted[number])
        optimizer.step()
        schedule.step()
        on_step(done, steps)
    with torch.no_grad():
        return {
            (layer, name): (value * (1 + moved[layer][name])).to("cpu", torch.float16)
            for layer, tensors in enumerate(values)
            for name, value in tensors.items()
        }


def tunable(stored: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a layer to tune, as float32: group scales and norm weights."""
    return {name: tensor.float() for name, tensor in stored.items() if name.endswith((".scales", "norm.weight"))}


def _descend(
    model: Model,
    values: Sequence[Tensors],
    moved: Sequence[Tensors],
    batch: Batch,
    hidden: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """Add to `moved` the gradient of the mean of 1 − cosine over the vectors of `batch`."""
    import torch

    block = model.block
    between = [hidden.to(block.device)]
    with torch.no_grad():
        for layer in range(model.layers):
            weights = _weights(model.read(layer), values[layer], moved[layer])
            between.append(block.compute(weights, layer, between[-1], batch))
    end = between.pop().requires_grad_()
    vectors = rms_norm(end[batch.last.to(end.device)], model.final_norm.to(end.device), model.epsilon)
    (1 - torch.nn.functional.cosine_similarity(vectors, wanted.to(end.device), dim=-1)).mean().backward()
    gradient = end.grad
    for layer in reversed(range(model.layers)):
        before = between.pop().requires_grad_()
        after = block.compute(_weights(model.read(layer), values[layer], moved[layer]), layer, before, batch)
        after.backward(gradient)
        gradient = before.grad


def _weights(stored: Tensors, values: Tensors, moved: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a layer in float32, linears dequantized, differentiable in `moved`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = values[f"{linear}.scales"] * (1 + moved[f"{linear}.scales"])
            levels, zeros = unpack(tensor).float(), unpack(stored[f"{linear}.qzeros"]).float()
            grouped = levels.unflatten(0, (scales.shape[0], -1))
            tensors[f"{linear}.weight"] = ((grouped - zeros[:, None]) * scales[:, None]).flatten(0, 1).T
        elif name in moved and kind != "scales":
            tensors[name] = values[name] * (1 + moved[name])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            tensors[name] = tensor.float()
    return tensors
