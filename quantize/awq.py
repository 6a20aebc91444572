"""Activation-aware weight quantization (Lin et al. 2023, https://arxiv.org/abs/2306.00978) over Gram matrices.

For a linear layer y = W x the squared output error of a changed weight, summed over the calibration tokens, is tr(ΔW · G ·
ΔWᵀ) with the Gram matrix G = Σ x xᵀ. So each point of a search is one matrix product, whatever the number of tokens. All
functions are pure: tensors in, tensors out. Shapes: weight [N, K], gram [K, K]; the group size g divides K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize.products import matmul

if TYPE_CHECKING:
    import torch

LEVELS = 15
SMALLEST_STEP = 2.0**-20
COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
FINE = (0.125, 0.0625, 0.03125, 0.0)
WIDEST = 32.0
CLIP_COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
CLIP_FINE = 0.05
SEARCHED = 512
"""Evenly spaced outputs that candidate scales are evaluated on (of the largest linear, if several share the scales)."""
CACHED = 2**17
"""Weights processed at a time, so that intermediate results stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """The 16 levels of each group: value = (q − zero_point) · scale.

    Attributes:
        scale: [N, K/g] float32, exactly representable in float16, which is what is stored.
        zero_point: [N, K/g] float32, integers 0…15.
        group_size: g, number of inputs that share a scale and a zero point.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    group_size: int

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest level of each value of `weight` [N, K]: float32 integers 0…15 of the same shape."""
        grouped = weight.unflatten(1, (-1, self.group_size))
        levels = (grouped / self.scale[..., None]).round_() + self.zero_point[..., None]
        return levels.clamp_(0, LEVELS).flatten(1)

    def dequantize(self, levels: torch.Tensor) -> torch.Tensor:
        """The values [N, K] float32 of integer `levels` [N, K]."""
        grouped = levels.unflatten(1, (-1, self.group_size))
        return ((grouped - self.zero_point[..., None]) * self.scale[..., None]).flatten(1)

    def divided(self, outputs: torch.Tensor) -> Grid:
        """The grid of the same levels for a weight whose rows are divided by `outputs` [N]."""
        import torch

        return Grid((self.scale / outputs[:, None]).to(torch.float16).float(), self.zero_point, self.group_size)

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid:
        """One grid for weights that are stacked by their rows."""
        import torch

        scale, zero_point = (torch.cat(parts) for parts in zip(*((grid.scale, grid.zero_point) for grid in grids), strict=True))
        return Grid(scale, zero_point, grids[0].group_size)

    def split(self, sizes: Sequence[int]) -> list[Grid]:
        """Undo `stacked`: the grids of weights with these numbers of rows."""
        parts = zip(self.scale.split(list(sizes)), self.zero_point.split(list(sizes)), strict=True)
        return [Grid(scale, zero_point, self.group_size) for scale, zero_point in parts]

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [N, K] rounded to the nearest level: `dequantize(quantize(weight))`."""
        return self.dequantize(self.quantize(weight))


def range_grid(weight: torch.Tensor, group_size: int, shrink: torch.Tensor | float = 1.0) -> Grid:
    """The grid between the minimum and the maximum of each group, both multiplied by `shrink` (a number or [N, K/g]).

    Zero is always a level, as in AutoAWQ, so that a pruned weight stays zero.
    """
    low, high = _ranges(weight, group_size)
    return _between(low * shrink, high * shrink, group_size)


def _ranges(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each group, extended to contain 0: two tensors [N, K/g]."""
    grouped = weight.unflatten(1, (-1, group_size))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _between(low: torch.Tensor, high: torch.Tensor, group_size: int) -> Grid:
    """The grid from `low` to `high`, both [N, K/g]."""
    import torch

    scale = ((high - low) / LEVELS).clamp(min=SMALLEST_STEP).to(torch.float16).float()
    return Grid(scale, (-low / scale).round().clamp(0, LEVELS), group_size)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(ΔW · G · ΔWᵀ), a scalar: squared output error of `difference` [N, K] over the calibration tokens."""
    return (matmul(difference, gram) * difference).sum()


def search_scales(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    group_size: int,
    fed_by: torch.Tensor | None = None,
    remaining: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scale of each input channel [K] float32 with the least rounding error of the `weights` that share the input.

    Candidates are those of the paper (section 3.2, s = x̄^ratio), the weight-aware forms s = x̄^ratio / w̄^(1 − ratio) and s =
    (x̄ / w̄)^ratio, with x̄ the root mean square of the channel's inputs and w̄ its mean weight relative to the largest of its
    group, and s = 1. The ratios in COARSE come first, then those around the best of each form at the distances in FINE.

    Args:
        weights: matrices [N_i, K] that read the same input.
        gram: [K, K] of that input.
        group_size: inputs that share a grid.
        fed_by: for each channel [K] int64 the output of the previous linear that feeds it. Channels fed by the same output get
            the same scale (heads that share a key-value head); None: each channel has an output of its own.
        remaining: [K], `rounding.Inverse.remaining_variance`, if GPTQ rounds afterwards: candidates are then evaluated by the
            expected error after compensation, and x̄ is the root of it. None: they are rounded to nearest and evaluated by
            tr(ΔW · G · ΔWᵀ).
    """
    import torch

    step = -(-max(map(len, weights)) // SEARCHED)
    weights = [weight[::step] for weight in weights]
    cost = gram.diagonal() if remaining is None else remaining
    activation, magnitude = cost.clamp(min=0).sqrt(), _relative_magnitude(weights, group_size)
    if fed_by is not None:
        activation = _mean_by(activation.square(), fed_by).sqrt()
        magnitude = _mean_by(magnitude, fed_by)
    activation, magnitude = _positive(activation), _positive(magnitude)
    forms: tuple[Callable[[float], torch.Tensor], ...] = (
        lambda ratio: activation**ratio,
        lambda ratio: activation**ratio / magnitude ** (1 - ratio),
        lambda ratio: (activation / magnitude) ** ratio,
    )

    def error(scales: torch.Tensor) -> float:
        if remaining is None:
            return sum(_nearest_error(weight, scales, gram, group_size) for weight in weights)
        return sum(_compensated_error(weight, scales, remaining, group_size) for weight in weights)

    best = torch.ones_like(activation)
    best_error = error(best)
    for form in forms:
        errors: dict[float, float] = {}
        ratios: tuple[float, ...] = COARSE
        for width in FINE:
            for ratio in set(ratios) - errors.keys():
                scales = _centred(form(ratio))
                errors[ratio] = error(scales) if torch.isfinite(scales).all() else float("inf")
                if errors[ratio] < best_error:
                    best, best_error = scales, errors[ratio]
            middle = min(errors, key=errors.__getitem__)
            ratios = tuple(ratio for ratio in (middle - width, middle + width) if 0 <= ratio <= 1)
    return best


def search_clip(weight: torch.Tensor, gram: torch.Tensor, group_size: int) -> Grid:
    """The grid with each group's range shrunk by the factor with the least error on the group's diagonal block of G.

    Blocks between groups are ignored (as in llm-awq's `auto_clip`), so that each group can be chosen by itself.
    """
    import torch

    blocks = torch.stack([gram[i : i + group_size, i : i + group_size] for i in range(0, weight.shape[1], group_size)])
    rows = max(1, CACHED // weight.shape[1])
    low, high = _ranges(weight, group_size)
    parts = zip(weight.split(rows), low.split(rows), high.split(rows), strict=True)
    best = torch.cat([_best_shrink(*part, blocks) for part in parts])
    return _between(low * best, high * best, group_size)


def _best_shrink(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Factor of each group's range [N, K/g]: the best in CLIP_COARSE, then CLIP_FINE more or less if that is better.

    `low` and `high` [N, K/g] are the ranges, `blocks` [K/g, g, g] the diagonal blocks of the Gram matrix.
    """
    import torch

    group_size = blocks.shape[-1]

    def cost(shrink: torch.Tensor | float) -> torch.Tensor:
        nearest = _between(low * shrink, high * shrink, group_size).nearest(weight)
        difference = nearest.sub_(weight).unflatten(1, (-1, group_size))
        return torch.einsum("ngi,gij->ngj", difference, blocks).mul_(difference).sum(-1)

    costs = torch.stack([cost(shrink) for shrink in CLIP_COARSE])
    least, place = costs.min(0)
    best = low.new_tensor(CLIP_COARSE)[place]
    for finer in ((best + CLIP_FINE).clamp(max=1), best - CLIP_FINE):
        found = cost(finer)
        best, least = torch.where(found < least, finer, best), torch.minimum(found, least)
    return best


def _relative_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Sum over the outputs of |weight| relative to the largest of its group, for each channel [K]."""
    total = weights[0].new_zeros(weights[0].shape[1])
    for weight in weights:
        grouped = weight.abs().unflatten(1, (-1, group_size))
        total += (grouped / grouped.amax(-1, keepdim=True).clamp(min=SMALLEST_STEP)).flatten(1).sum(0)
    return total


def _nearest_error(weight: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, group_size: int) -> float:
    """Output error of `weight` · `scales` rounded to nearest."""
    scaled = weight * scales
    rounded = range_grid(scaled, group_size).nearest(scaled).div_(scales)
    return output_error(rounded.sub_(weight), gram).item()


def _compensated_error(weight: torch.Tensor, scales: torch.Tensor, remaining: torch.Tensor, group_size: int) -> float:
    """Expected output error of `weight` · `scales` rounded by GPTQ.

    Rounding errors are uniform over a step, so their mean square is step² / 12. Scaling the inputs by 1/s scales the rows of
    the Cholesky factor by s, hence the remaining variance by 1/s².
    """
    steps = range_grid(weight * scales, group_size).scale.square().sum(0).repeat_interleave(group_size)
    return (steps * remaining / scales.square()).sum().item() / 12


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two. Dividing by them is exact, so values computed before the division stay valid."""
    return scales.log2().round().exp2()


def _centred(scales: torch.Tensor) -> torch.Tensor:
    """`scales` centred on 1 and clamped to WIDEST, so that float16 can hold the quotients."""
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / WIDEST, WIDEST)


def _mean_by(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Replace each of `values` [K] by the mean over its group, numbered by `group` [K] int64."""
    sums = values.new_zeros(int(group.max()) + 1).index_add(0, group, values)
    return (sums / group.bincount())[group]


def _positive(values: torch.Tensor) -> torch.Tensor:
    """`values` relative to their mean; dead channels are raised to a ten-thousandth of it."""
    mean = values.mean()
    return (values / mean).clamp(min=1e-4) if mean > 0 else values.new_ones(values.shape)
