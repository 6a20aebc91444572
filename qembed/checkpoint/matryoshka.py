"""Matryoshka vectors: a prefix of a vector, scaled to unit length, is a vector too (Kusupati et al. 2022)."""

from __future__ import annotations

SIZES = (32, 64, 128, 256, 512, 768, 1024, 2048, 2560, 4096)


def sizes(hidden_size: int) -> list[int]:
    """The lengths that a request's `dimensions` may ask for: the usual ones below `hidden_size`, and `hidden_size` itself."""
    return [size for size in SIZES if size < hidden_size] + [hidden_size]
