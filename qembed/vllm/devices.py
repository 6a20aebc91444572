"""Devices to plan for: a CPU, a GPU of a given memory, and presets for common cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qembed import sizes
from qembed.errors import BadInput

Device = Literal["cpu", "cuda"]

FP8_CAPABILITY = 8.9


@dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
        kind: "cpu" or "cuda".
        name: what to call it.
        memory: bytes it has in all; None if unknown.
        free: bytes that nothing else uses; None if unknown.
        capability: the CUDA compute capability (8.9 for an L4); None for a CPU, or if unknown.
    """

    kind: Device
    name: str
    memory: int | None = None
    free: int | None = None
    capability: float | None = None

    @property
    def has_fp8(self) -> bool:
        """Whether it computes with 8-bit floats (Ada, Hopper and later), so that a cache in them costs no time."""
        return self.kind == "cuda" and (self.capability is None or self.capability >= FP8_CAPABILITY)


# `nvidia-smi --query-gpu=memory.total` of each: less than the round figure of the data sheet, for the driver keeps a part.
PRESETS = {
    "T4": Target("cuda", "T4", 15_360 * 2**20, 15_360 * 2**20, 7.5),
    "L4": Target("cuda", "L4", 23_034 * 2**20, 23_034 * 2**20, 8.9),
    "A10G": Target("cuda", "A10G", 23_028 * 2**20, 23_028 * 2**20, 8.6),
}


def named(text: str) -> Target:
    """The device that `text` names: a preset, the size of a GPU's memory ("4GiB"), or of a CPU machine's ("cpu:4GiB").

    Raises:
        BadInput: it is none of these.
    """
    if (preset := PRESETS.get(text.upper())) is not None:
        return preset
    kind, _, amount = text.rpartition(":")
    if kind not in ("", "cpu", "cuda"):
        raise BadInput(f"{text!r}: a device is {', '.join(PRESETS)}, a size such as 4GiB, or cpu:4GiB")
    memory = sizes.parse(amount, f"is none of {', '.join(PRESETS)}, and no size such as 4GiB or cpu:4GiB")
    return Target("cpu" if kind == "cpu" else "cuda", text, memory, memory)
