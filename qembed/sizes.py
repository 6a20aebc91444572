"""Memory sizes in bytes, as people read and write them."""

from __future__ import annotations

import re

from qembed.errors import BadInput

SMALLEST_BARE = 2**20
"""A number without a unit below this is taken for a forgotten unit: nobody means 3 bytes of memory."""
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {f"{unit}ib": size for unit, size in UNITS.items() if len(unit) == 1}


def parse(text: str, otherwise: str = "is no size; write it as 512MiB, 3GiB or 3.5GB") -> int:
    """Bytes of "3GiB", "512 MiB", "3.5GB" or "33554432"; a bare K, M, G or T is binary.

    Raises:
        BadInput: it is none of these, less than one byte, or a number below SMALLEST_BARE without a unit; `otherwise` is the
            message after `text`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2].rstrip() not in UNITS or (amount := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise BadInput(f"{text!r} {otherwise}")
    if not match[2] and amount < SMALLEST_BARE:
        raise BadInput(f"{text!r} without a unit is a number of bytes; write {match[1]}GiB or {match[1]}MiB")
    return amount


def gib(size: int) -> str:
    """`size` bytes as "512 MiB" or "3.5 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
