"""Arrays that may be larger than the memory that one wants to give away."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAPPED_BYTES = 256 * 2**20


def empty(shape: tuple[int, int], folder: Path | None = None) -> NDArray[np.float32]:
    """A float32 array to fill: in memory, or for more than MAPPED_BYTES in a file of `folder` that vanishes with this process.

    The system takes the pages of such a file out of memory when it needs the room. `folder` None is that of temporary files.
    """
    if shape[0] * shape[1] * 4 <= MAPPED_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder, prefix="vectors-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
