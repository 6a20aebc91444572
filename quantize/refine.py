"""The last stage (`--refine`): tunes scales and norm weights by gradient towards the original model's vectors.

Layer-wise quantization keeps each layer close to the original, but the quality of an embedding depends on the angle between the
final vectors. Levels and zero points are integers and stay fixed; scales and norm weights are the only numbers of the format
that can change gradually.

Memory stays close to that of a single layer: the forward pass keeps the hidden states between layers, and the backward pass
recomputes each layer from them (gradient checkpointing, Chen et al. 2016, https://arxiv.org/abs/1604.06174). Only the state of
the optimization grows with the model: four float32 numbers per scale, 13% of the size of INT4 weights in groups of 128.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.awq_layout import unpack
from qembed.checkpoint.head import Head
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import DecoderLayer
from qembed.quantize.hidden import Stream, text_vectors
from qembed.quantize.parts import REFINED, Parts

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)
WARM_UP_STEPS = 10

Tensors = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Model:
    """An INT4 model whose layers are stored in `parts`.

    Attributes:
        block: computes a layer.
        prefix: the prefix of the checkpoint's tensor names.
        layers: number of layers.
        parts: the stored layers.
        final_norm: weight [hidden] float32 of the final norm, which is not tuned.
        epsilon: epsilon of the final norm.
        head: what follows that norm; it is not tuned either.
    """

    block: DecoderLayer
    prefix: str
    layers: int
    parts: Parts
    final_norm: torch.Tensor
    epsilon: float
    head: Head

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The stored tensors of a layer, on the block's device, named without the layer's prefix."""
        tensors, _ = self._part(layer)
        prefix = f"{self.prefix}layers.{layer}."
        return {name.removeprefix(prefix): tensor.to(self.block.device) for name, tensor in tensors.items()}

    def replace(self, layer: int, changes: Tensors) -> None:
        """Overwrite the stored tensors of a layer that `changes` contains, named as by `read`."""
        tensors, notes = self._part(layer)
        prefix = f"{self.prefix}layers.{layer}."
        self.parts.write(f"layer-{layer:03d}", {**tensors, **{prefix + name: value for name, value in changes.items()}}, notes)

    def _part(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        part = self.parts.read(f"layer-{layer:03d}")
        if part is None:
            raise ValueError(f"layer {layer} is not finished")
        return part


def refine(
    model: Model,
    start: Stream,
    targets: Sequence[torch.Tensor],
    *,
    epochs: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Tune the scales and norm weights of `model`, in its parts, so that its vectors come closer to `targets`.

    The tuned tensors are first written to a part of their own (REFINED), then into the layers. So a run that is interrupted
    between layers and resumed ends with the same bytes.

    Args:
        model: the model to tune.
        start: the hidden states before the first layer.
        targets: for each batch, the original model's vectors [V, width], of any length, as from `hidden.text_vectors`.
        epochs: number of times to go through all batches.
        seed: draws the order of the batches.
        learning_rate: of Adam (Kingma and Ba 2015); it applies to relative changes of the values.
        on_step: called with (steps done, steps in all).
    """
    if REFINED not in model.parts:
        tuned = _tune(model, start, targets, epochs, seed, learning_rate, on_step)
        model.parts.write(REFINED, {f"{layer}.{name}": value for (layer, name), value in tuned.items()}, {})
    tensors, _ = model.parts.read(REFINED) or ({}, {})
    for layer in range(model.layers):
        prefix = f"{layer}."
        changes = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        model.replace(layer, changes)


def _tune(
    model: Model,
    start: Stream,
    targets: Sequence[torch.Tensor],
    epochs: int,
    seed: int,
    learning_rate: float,
    on_step: Callable[[int, int], None],
) -> dict[tuple[int, str], torch.Tensor]:
    """The tuned tensors, float16 on the CPU, by layer and name."""
    import torch

    initial = [tunable(model.read(layer)) for layer in range(model.layers)]
    changes = [{name: torch.zeros_like(value, requires_grad=True) for name, value in layer.items()} for layer in initial]
    steps = epochs * len(start.batches)
    optimizer = torch.optim.Adam([tensor for layer in changes for tensor in layer.values()], lr=learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    draw = random.Random(seed)
    order = [number for _ in range(epochs) for number in draw.sample(range(len(start.batches)), len(start.batches))]
    for done, number in enumerate(order, 1):
        optimizer.zero_grad()
        _add_gradients(model, initial, changes, start.batches[number], start.hidden[number], targets[number])
        optimizer.step()
        schedule.step()
        on_step(done, steps)
    with torch.no_grad():
        return {
            (layer, name): (value * (1 + changes[layer][name])).to("cpu", torch.float16)
            for layer, tensors in enumerate(initial)
            for name, value in tensors.items()
        }


def tunable(stored: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a layer that are tuned, in float32: group scales and norm weights."""
    return {name: tensor.float() for name, tensor in stored.items() if name.endswith((".scales", "norm.weight"))}


def _add_gradients(
    model: Model,
    initial: Sequence[Tensors],
    changes: Sequence[Tensors],
    batch: Batch,
    hidden: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Add the gradients of the loss to `changes`: the mean of 1 − cosine over the vectors of `batch`.

    `hidden` are the hidden states before the first layer, `target` the original model's vectors.
    """
    import torch

    block = model.block
    states = [hidden.to(block.device)]
    with torch.no_grad():
        for layer in range(model.layers):
            weights = _weights(model.read(layer), initial[layer], changes[layer])
            states.append(block.run_with(weights, layer, states[-1], batch))
    last = states.pop().requires_grad_()
    vectors = text_vectors(last, batch, model.final_norm.to(last.device), model.epsilon, model.head)
    (1 - torch.nn.functional.cosine_similarity(vectors, target.to(last.device), dim=-1)).mean().backward()
    gradient = last.grad
    for layer in reversed(range(model.layers)):
        before = states.pop().requires_grad_()
        after = block.run_with(_weights(model.read(layer), initial[layer], changes[layer]), layer, before, batch)
        after.backward(gradient)
        gradient = before.grad


def _weights(stored: Tensors, initial: Tensors, changes: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a layer in float32, packed linear layers as `weight`, with relative `changes`; differentiable in them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = initial[f"{linear}.scales"] * (1 + changes[f"{linear}.scales"])
            levels, zeros = unpack(tensor).float(), unpack(stored[f"{linear}.qzeros"]).float()
            grouped = levels.unflatten(0, (scales.shape[0], -1))
            tensors[f"{linear}.weight"] = ((grouped - zeros[:, None]) * scales[:, None]).flatten(0, 1).T
        elif name in changes and kind != "scales":
            tensors[name] = initial[name] * (1 + changes[name])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            tensors[name] = tensor.float()
    return tensors
