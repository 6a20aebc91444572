"""The last stage, asked for by `--refine`: scales and norm weights tuned by gradient to the original model's vectors.

Layer-wise quantization keeps each layer near the original; what counts in the end is the angle between two vectors. The
integers stay as they are, and so do the zero points, which are integers too: scales and norm weights are the only numbers of
the format that can move by little.

Memory stays near that of one layer: the forward pass keeps the hidden states between layers, and the backward pass computes
each layer anew from them (gradient checkpointing, Chen et al. 2016, https://arxiv.org/abs/1604.06174). What grows with the
model is four float32 numbers for each scale, 13% of the size of INT4 weights in groups of 128.
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
    """An INT4 model whose layers stand in `parts` under the tensor names of a checkpoint.

    Attributes:
        block: computes a layer.
        prefix: of the checkpoint's tensor names.
        layers: how many there are.
        parts: where the layers stand.
        final_norm: [hidden] float32. It is not tuned.
        epsilon: of the final norm.
    """

    block: DecoderLayer
    prefix: str
    layers: int
    parts: Parts
    final_norm: torch.Tensor
    epsilon: float

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer as they are stored, on the block's device, named without the layer's prefix."""
        tensors, _ = self._part(layer)
        start = f"{self.prefix}layers.{layer}."
        return {name.removeprefix(start): tensor.to(self.block.device) for name, tensor in tensors.items()}

    def replace(self, layer: int, changed: Tensors) -> None:
        """Put the tensors `changed`, named as `read` names them, in the place of those stored."""
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
    """Tune the scales and norms of `model`, in its parts, so that its vectors come nearer to `wanted`.

    What is tuned stands in a part of its own before it goes into the layers, so that a run that is broken off there and
    resumed ends with the same bytes.

    Args:
        model: see there.
        start: the hidden states before the first layer.
        wanted: for each batch, the original model's vectors [V, hidden], of any length, at the positions of `Batch.last`.
        epochs: how often each batch is seen.
        seed: decides their order.
        learning_rate: of Adam (Kingma and Ba 2015); changes are relative to a tensor's own values.
        on_step: called with (steps done, steps in all).
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
    """The tensors that are tuned, float16 on the CPU, by layer and name."""
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
    """Of the tensors of a layer those that are tuned, as float32: group scales and norm weights."""
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
    """The tensors of a layer as its code wants them, differentiable in `moved`."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = values[f"{linear}.scales"] * (1 + moved[f"{linear}.scales"])
            levels, zeros = unpack(tensor).float(), unpack(stored[f"{linear}.qzeros"]).float()
            grouped = levels.unflatten(0, (scales.shape[0], -1))
            made[f"{linear}.weight"] = ((grouped - zeros[:, None]) * scales[:, None]).flatten(0, 1).T
        elif name in moved and kind != "scales":
            made[name] = values[name] * (1 + moved[name])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            made[name] = tensor.float()
    return made
