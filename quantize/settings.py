"""Settings of a quantization run, and the report of its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qembed.quantize.blocks import LINEARS

ROUNDING_ALIASES = {"compensated": "gptq", "nearest": "rtn"}
"""Former names of the values of `rounding`, which command lines and interrupted runs may still contain."""


@dataclass(frozen=True)
class QuantizationSettings:
    """Everything that determines the result, besides the checkpoint and the calibration.

    Attributes:
        group_size: number of inputs that share a scale and a zero point.
        scales: "awq" searches a scale per input channel; "none" leaves the weights unscaled.
        clip: whether to search for a smaller range for each group.
        rounding: "gptq", or "rtn" (round to nearest).
        target: "original" fits each linear layer to the original model's outputs; "layer" fits it to its own.
        inputs: the activations that each layer is fitted on: "quantized", its inputs in the INT4 model, or "original", its
            inputs in the original model. "original" requires the target "layer".
        prefixes: number of prefixes of each calibration text that count as additional texts. None: decided by the model
            (`layerwise.for_model`).
        mixed: length in tokens of the mixed copy of each calibration text (`qembed.quantize.mixing`); 0 for no copies.
        last_share: 0…1, total weight of the last tokens of texts and prefixes; 0 weights all tokens equally. None: decided by
            the model and its tokenizer (`layerwise.for_model`).
        refine: epochs of the last stage (`qembed.quantize.refine`); 0 skips it.
        token_table: "float16", or "int8" (`qembed.checkpoint.int8_table`), which only qembed's vLLM plugin reads.
        engine: "native", or "autoawq" for the AutoAWQ library (`qembed.quantize.autoawq`), which supports only `group_size`,
            `clip` and `token_table`.
    """

    group_size: int = 128
    scales: str = "awq"
    clip: bool = True
    rounding: str = "gptq"
    target: str = "original"
    inputs: str = "quantized"
    prefixes: int | None = None
    mixed: int = 16
    last_share: float | None = None
    refine: int = 0
    token_table: str = "float16"
    engine: str = "native"


@dataclass
class Report:
    """The losses of a run.

    Attributes:
        error: relative output errors of each kind of linear layer, one value per layer.
        cosines: cosine similarity between INT4 and original vector, one value per held-out text.
        scores: of a reranker, the score of each held-out pair in the original and in the INT4 model.
        queries: of a reranker, the number of the query of each of these pairs.
        table_error: relative error of the INT8 token table; None for float16.
        largest: the largest magnitude of the inputs and of the outputs ([input, output]) of each kind of linear layer, one pair
            per layer, in the INT4 model on the calibration texts.
        residual: the largest magnitude of the residual stream after each layer or its attention.
        scaled: names of linear layers whose outputs were divided to keep within float16, and the largest divisor of each.
    """

    error: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LINEARS})
    cosines: list[float] = field(default_factory=list)
    scores: list[Sequence[float]] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    table_error: float | None = None
    largest: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in LINEARS})
    residual: list[float] = field(default_factory=list)
    scaled: dict[str, float] = field(default_factory=dict)

    def add_ranges(self, ranges: Mapping[str, Any]) -> None:
        """Add the largest magnitudes of the next layer, from `Ranges.record`."""
        layer = len(self.residual)
        self.residual.append(ranges["residual"])
        for name, pair in ranges["linears"].items():
            self.largest[name].append(pair)
        self.scaled |= {f"layers.{layer}.{name}": divisor for name, divisor in ranges["scaled"].items()}

    def relative_error(self, name: str) -> float:
        """Root mean square over all layers of the relative output error of the kind of linear layer `name`."""
        values = self.error[name]
        return (sum(value**2 for value in values) / len(values)) ** 0.5
