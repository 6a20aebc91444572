"""What decides the result of quantization, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from qembed.quantize.blocks import LINEARS


@dataclass(frozen=True)
class QuantizationSettings:
    """What decides the result, beside the checkpoint and the calibration.

    Attributes:
        group_size: inputs that share a scale and a zero point.
        scales: "awq" searches a scale per input channel, "none" leaves the weights as they are.
        clip: whether ranges are shrunk by search.
        rounding: "gptq" (error-compensated) or "rtn" (to nearest).
        target: "original" fits each linear to what the original model has there, "layer" to its own outputs.
        inputs: "quantized", what layers read in the INT4 model, or "original", what they read in the original one, is what each
            layer is fitted to. "original" goes with the target "layer".
        prefixes: of each calibration text, how many prefixes count as texts of their own.
        mixed: tokens of the mixed copy of each calibration text (`qembed.quantize.mixing`); 0 for none.
        last_share: 0…1, what the last tokens of texts and prefixes count of all tokens; 0 weighs every token alike. None leaves
            it to the tokenizer (`stream.last_share`).
        refine: how often the last stage sees each text (`qembed.quantize.refine`); 0 leaves it out.
        token_table: "float16", or "int8" (`qembed.checkpoint.int8_table`), which only our vLLM plugin reads.
        engine: "native", or "autoawq": the AutoAWQ library (`qembed.quantize.autoawq`), which knows `group_size`, `clip` and
            `token_table`.
    """

    group_size: int = 128
    scales: str = "awq"
    clip: bool = True
    rounding: str = "gptq"
    target: str = "original"
    inputs: str = "quantized"
    prefixes: int = 8
    mixed: int = 32
    last_share: float | None = None
    refine: int = 0
    token_table: str = "float16"
    engine: str = "native"


@dataclass
class Report:
    """What was lost: by kind of linear over all layers, in the vectors of the texts kept apart, and in an INT8 token table."""

    error: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LINEARS})
    cosines: list[float] = field(default_factory=list)
    table_error: float | None = None

    def relative_error(self, name: str) -> float:
        """Root mean square output error of a kind of linear, relative to the root mean square of its output."""
        values = self.error[name]
        return (sum(value**2 for value in values) / len(values)) ** 0.5
