"""Devices to plan memory for: this machine's, a GPU or CPU of a given size, and presets for common GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qembed import sizes
from qembed.errors import BadInput

Device = Literal["cpu", "cuda"]

FP8_CAPABILITY = 8.9
BFLOAT16_CAPABILITY = 8.0


@dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
        kind: "cpu" or "cuda".
        name: its name for people.
        memory: total bytes; None if unknown.
        free: free bytes; None if unknown.
        capability: the CUDA compute capability (8.9 for an L4); None for a CPU, or if unknown.
    """

    kind: Device
    name: str
    memory: int | None = None
    free: int | None = None
    capability: float | None = None

    @property
    def has_fp8(self) -> bool:
        """Whether it computes with 8-bit floats (Ada, Hopper and later), so that an FP8 cache costs no time."""
        return self.kind == "cuda" and (self.capability is None or self.capability >= FP8_CAPABILITY)

    @property
    def has_bfloat16(self) -> bool:
        """Whether it is a GPU that computes with bfloat16 (Ampere and later). One of unknown capability is taken for such."""
        return self.kind == "cuda" and (self.capability is None or self.capability >= BFLOAT16_CAPABILITY)


# From `nvidia-smi --query-gpu=memory.total`. Less than in the data sheet, because the driver reserves a part.
PRESETS = {
    "T4": Target("cuda", "T4", 15_360 * 2**20, 15_360 * 2**20, 7.5),
    "L4": Target("cuda", "L4", 23_034 * 2**20, 23_034 * 2**20, 8.9),
    "A10G": Target("cuda", "A10G", 23_028 * 2**20, 23_028 * 2**20, 8.6),
}


def named(text: str) -> Target:
    """The device named `text`: a preset, a GPU with so much memory ("4GiB"), or a CPU machine ("cpu:4GiB").

    Raises:
        BadInput: it is none of these.
    """
    if (preset := PRESETS.get(text.upper())) is not None:
        return preset
    kind, _, amount = text.rpartition(":")
    if kind not in ("", "cpu", "cuda"):
        raise BadInput(f"{text!r}: a device is {', '.join(PRESETS)}, a size such as 4GiB, or cpu:4GiB")
    memory = sizes.parse(amount, f"is none of {', '.join(PRESETS)}, and not a size such as 4GiB or cpu:4GiB")
    return Target("cpu" if kind == "cpu" else "cuda", text, memory, memory)
