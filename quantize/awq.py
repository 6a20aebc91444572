"""Activation-aware weight quantization (AWQ, Lin et al. 2023, https://arxiv.org/abs/2306.00978) on Gram matrices.

For a linear layer y = W x, changing the weight by ΔW causes the squared output error tr(ΔW · G · ΔWᵀ), summed over the
calibration tokens, with the Gram matrix G = Σ x xᵀ. So a candidate of a search costs one matrix product, whatever the number of
tokens. All functions are pure: tensors in, tensors out. Shapes: weight [N, K], gram [K, K]; the group size g divides K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize.products import linear

if TYPE_CHECKING:
    import torch

MAX_LEVEL = 15
"""The largest 4-bit integer."""
MIN_SCALE = 2.0**-20
"""Lower bound of a group's scale, which float16 can store."""
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Exponents that the search for scales tries first."""
RATIO_STEPS = (0.125, 0.0625, 0.03125, 0.0)
"""Distances of the next exponents from the best so far, by round of the search; 0 ends it."""
SMALLEST_HALF = 2.0**-24
"""The smallest positive number of float16."""
MAX_CHANNEL_SCALE = 32.0
"""Scales of channels lie between 1/32 and 32."""
SHRINK_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Factors of a group's range that the search for clipping tries first."""
SHRINK_STEP = 0.05
"""Distance of two further factors from the best of them."""
SEARCH_OUTPUTS = 512
"""Maximum number of outputs, evenly spaced, by which scales are judged; with several weights, of the largest."""
CHUNK_WEIGHTS = 2**17
"""Number of weights that are clipped at a time, so that intermediate results fit a core's cache."""


@dataclass(frozen=True)
class Grid:
    """The 16 levels of each group: value = (q − zero_point) · scale.

    Attributes:
        scale: [N, K/g] float32, each value exactly representable in float16, the type in which it is stored.
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
        return levels.clamp_(0, MAX_LEVEL).flatten(1)

    def dequantize(self, levels: torch.Tensor) -> torch.Tensor:
        """The values [N, K] float32 of integer `levels` [N, K]."""
        grouped = levels.unflatten(1, (-1, self.group_size))
        return ((grouped - self.zero_point[..., None]) * self.scale[..., None]).flatten(1)

    def rtn(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [N, K] rounded to the nearest level: `dequantize(quantize(weight))`."""
        return self.dequantize(self.quantize(weight))

    def divide_rows(self, divisors: torch.Tensor) -> Grid:
        """The grid with the same levels for the weight whose rows are divided by `divisors` [N]."""
        import torch

        scale = (self.scale / divisors[:, None]).clamp(min=SMALLEST_HALF).to(torch.float16).float()
        return Grid(scale, self.zero_point, self.group_size)

    @staticmethod
    def stack(grids: Sequence[Grid]) -> Grid:
        """A single grid for weights that are stacked by rows."""
        import torch

        scale, zero_point = (
            torch.cat(tensors) for tensors in zip(*((grid.scale, grid.zero_point) for grid in grids), strict=True)
        )
        return Grid(scale, zero_point, grids[0].group_size)

    def split(self, sizes: Sequence[int]) -> list[Grid]:
        """Inverse of `stack`: the grids of weights with these numbers of rows."""
        pairs = zip(self.scale.split(list(sizes)), self.zero_point.split(list(sizes)), strict=True)
        return [Grid(scale, zero_point, self.group_size) for scale, zero_point in pairs]


def range_grid(weight: torch.Tensor, group_size: int, shrink: torch.Tensor | float = 1.0) -> Grid:
    """The grid from the smallest to the largest value of each group, both multiplied by `shrink` (a number or [N, K/g]).

    Zero is always a level, as in AutoAWQ, so that a pruned weight stays zero.
    """
    low, high = _ranges(weight, group_size)
    return _grid_between(low * shrink, high * shrink, group_size)


def _ranges(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value of each group, both [N, K/g]; the range is widened to include 0."""
    grouped = weight.unflatten(1, (-1, group_size))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _grid_between(low: torch.Tensor, high: torch.Tensor, group_size: int) -> Grid:
    """The grid from `low` to `high`, both [N, K/g]."""
    import torch

    scale = ((high - low) / MAX_LEVEL).clamp(min=MIN_SCALE).to(torch.float16).float()
    return Grid(scale, (-low / scale).round().clamp(0, MAX_LEVEL), group_size)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(ΔW · G · ΔWᵀ): a scalar, the squared output error that `difference` [N, K] causes on the calibration tokens."""
    return (linear(difference, gram) * difference).sum()  # G is symmetric


def search_scales(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    group_size: int,
    sources: torch.Tensor | None = None,
    remaining_variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scale of each input channel [K] float32 that minimizes the error of rounding the `weights`, which share it.

    Candidates are those of the paper (section 3.2, s = x̄^ratio), the weight-aware form s = x̄^ratio / w̄^(1 − ratio), the form
    s = (x̄ / w̄)^ratio, and s = 1. x̄ is the root mean square of the channel's inputs, w̄ its mean weight relative to the largest
    of its group. The search tries the ratios in RATIOS, then those around the best of each form, at the distances in
    RATIO_STEPS. It judges them on SEARCH_OUTPUTS outputs.

    Args:
        weights: matrices [N_i, K] that read the same input.
        gram: [K, K] of that input.
        group_size: number of inputs that share a grid.
        sources: for each channel [K] int64, the index of the output of the previous linear layer that feeds it. Channels with
            the same source get the same scale (the heads of one key-value head). None: each channel has a source of its own.
        remaining_variance: [K], from `rounding.Inverse.remaining_variance`, if GPTQ does the rounding. Candidates are then
            judged by their expected error after GPTQ, and x̄ is the root of `remaining_variance`. None: they are rounded to
            nearest and judged by tr(ΔW · G · ΔWᵀ).
    """
    import torch

    step = -(-max(map(len, weights)) // SEARCH_OUTPUTS)
    weights = [weight[::step] for weight in weights]
    variance = gram.diagonal() if remaining_variance is None else remaining_variance
    activation, magnitude = variance.clamp(min=0).sqrt(), _relative_magnitude(weights, group_size)
    if sources is not None:
        activation = _group_means(activation.square(), sources).sqrt()
        magnitude = _group_means(magnitude, sources)
    activation, magnitude = _relative_to_mean(activation), _relative_to_mean(magnitude)
    forms: tuple[Callable[[float], torch.Tensor], ...] = (
        lambda ratio: activation**ratio,
        lambda ratio: activation**ratio / magnitude ** (1 - ratio),
        lambda ratio: (activation / magnitude) ** ratio,
    )

    def error(scales: torch.Tensor) -> float:
        if remaining_variance is None:
            return sum(_rtn_error(weight, scales, gram, group_size) for weight in weights)
        return sum(_gptq_error(weight, scales, remaining_variance, group_size) for weight in weights)

    best = torch.ones_like(activation)
    best_error = error(best)
    for form in forms:
        errors: dict[float, float] = {}
        ratios: tuple[float, ...] = RATIOS
        for distance in RATIO_STEPS:
            for ratio in set(ratios) - errors.keys():
                scales = _center(form(ratio))
                errors[ratio] = error(scales) if torch.isfinite(scales).all() else float("inf")
                if errors[ratio] < best_error:
                    best, best_error = scales, errors[ratio]
            best_ratio = min(errors, key=errors.__getitem__)
            ratios = tuple(ratio for ratio in (best_ratio - distance, best_ratio + distance) if 0 <= ratio <= 1)
    return best


def search_clip(weight: torch.Tensor, gram: torch.Tensor, group_size: int) -> Grid:
    """The grid whose range is shrunk, for each output channel and group, by the factor with the smallest output error.

    The error counts only the group's own block of G, not the blocks between groups (as in llm-awq's `auto_clip`), so that each
    group is searched independently.
    """
    import torch

    blocks = torch.stack([gram[i : i + group_size, i : i + group_size] for i in range(0, weight.shape[1], group_size)])
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    low, high = _ranges(weight, group_size)
    chunks = zip(weight.split(rows), low.split(rows), high.split(rows), strict=True)
    best = torch.cat([_best_shrink(*chunk, blocks) for chunk in chunks])
    return _grid_between(low * best, high * best, group_size)


def _best_shrink(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The best factor for the range of each group [N, K/g]: the best of SHRINK_FACTORS, or SHRINK_STEP above or below it.

    `low` and `high` are the ranges [N, K/g], `blocks` the diagonal blocks of the Gram matrix [K/g, g, g].
    """
    import torch

    group_size = blocks.shape[-1]

    def error(shrink: torch.Tensor | float) -> torch.Tensor:
        rounded = _grid_between(low * shrink, high * shrink, group_size).rtn(weight)
        difference = rounded.sub_(weight).unflatten(1, (-1, group_size))
        return torch.einsum("ngi,gij->ngj", difference, blocks).mul_(difference).sum(-1)

    smallest, index = torch.stack([error(shrink) for shrink in SHRINK_FACTORS]).min(0)
    best = low.new_tensor(SHRINK_FACTORS)[index]
    for shrink in ((best + SHRINK_STEP).clamp(max=1), best - SHRINK_STEP):
        errors = error(shrink)
        best, smallest = torch.where(errors < smallest, shrink, best), torch.minimum(errors, smallest)
    return best


def _relative_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """For each channel [K], the sum of its absolute weights, each relative to the largest of its group."""
    total = weights[0].new_zeros(weights[0].shape[1])
    for weight in weights:
        grouped = weight.abs().unflatten(1, (-1, group_size))
        total += (grouped / grouped.amax(-1, keepdim=True).clamp(min=MIN_SCALE)).flatten(1).sum(0)
    return total


def _rtn_error(weight: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, group_size: int) -> float:
    """The output error of rounding `weight` · `scales` to nearest."""
    scaled = weight * scales
    rounded = range_grid(scaled, group_size).rtn(scaled).div_(scales)
    return output_error(rounded.sub_(weight), gram).item()


def _gptq_error(weight: torch.Tensor, scales: torch.Tensor, remaining_variance: torch.Tensor, group_size: int) -> float:
    """The expected output error of rounding `weight` · `scales` with GPTQ.

    Rounding errors are spread evenly over a step, so a squared error is step² / 12 on average. Dividing the inputs by s
    multiplies the columns of the Cholesky factor U by s, and therefore divides the remaining variance by s².
    """
    steps = range_grid(weight * scales, group_size).scale.square().sum(0).repeat_interleave(group_size)
    return (steps * remaining_variance / scales.square()).sum().item() / 12


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two. Dividing by them is exact, so results computed before the division stay valid."""
    return scales.log2().round().exp2()


def _center(scales: torch.Tensor) -> torch.Tensor:
    """`scales` with extremes whose geometric mean is 1, limited by MAX_CHANNEL_SCALE: float16 must hold the folded weights."""
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / MAX_CHANNEL_SCALE, MAX_CHANNEL_SCALE)


def _group_means(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Replace each of `values` [K] by the mean of the values with the same number in `groups` [K] int64."""
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return (sums / groups.bincount())[groups]


def _relative_to_mean(values: torch.Tensor) -> torch.Tensor:
    """`values` divided by their mean; dead channels are raised to 1e-4."""
    mean = values.mean()
    return (values / mean).clamp(min=1e-4) if mean > 0 else values.new_ones(values.shape)
