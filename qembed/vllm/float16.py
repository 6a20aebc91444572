"""Float16 is refused for a checkpoint whose numbers it cannot hold: as its manifest says, or as its first answers show."""

from __future__ import annotations

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.float16 import overflow
from qembed.errors import BadInput
from qembed.vllm.devices import BFLOAT16_CAPABILITY, Target

TEXTS = ("import", "import os", "import os\nimport sys", "The quick brown fox jumps over the lazy dog.")
"""Texts like those that overflow in Qwen3-Embedding-8B (QwenLM/Qwen3-Embedding#164), in layer 2's down_proj, and a sentence."""


def check_manifest(checkpoint: Checkpoint, dtype: str, target: Target) -> None:
    """Refuse float16 for a checkpoint whose numbers it cannot hold, as far as its manifest tells.

    Raises:
        BadInput: `dtype` is float16, and `quantize` saw larger numbers.
    """
    if dtype == "float16" and (reason := overflow(checkpoint.manifest)) is not None:
        raise refusal(checkpoint, reason, target)


def refusal(checkpoint: Checkpoint, reason: str, target: Target) -> BadInput:
    """The error for a checkpoint that float16 cannot compute, for a `reason` in words."""
    advice = "use --dtype bfloat16"
    if target.kind == "cuda" and not target.has_bfloat16:
        needed = f"{BFLOAT16_CAPABILITY:g} or later"
        advice = f"{target.name} has no bfloat16: use a GPU of compute capability {needed}, or a CPU"
    if not checkpoint.is_int4:
        advice += ", or quantize it: qembed quantize scales down what it can"
    return BadInput(f"{checkpoint.folder}: vectors could be NaN in float16, whose largest number is 65,504: {reason}; {advice}")
