"""Memory sizes as people write them, and what the cards that this is mostly for have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qembed.errors import BadInput

Device = Literal["cpu", "cuda"]

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {f"{unit}ib": size for unit, size in UNITS.items() if len(unit) == 1}
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
    memory = size(amount, f"is none of {', '.join(PRESETS)}, and no size such as 4GiB or cpu:4GiB")
    return Target("cpu" if kind == "cpu" else "cuda", text, memory, memory)


def size(text: str, otherwise: str = "is no size; write it as 512MiB, 3GiB or 3.5GB") -> int:
    """Bytes of "3GiB", "512 MiB", "3.5GB" or "1000"; a bare K, M, G or T is binary.

    Raises:
        BadInput: it is none of these, or nothing is left of it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2].rstrip() not in UNITS or (amount := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise BadInput(f"{text!r} {otherwise}")
    return amount
