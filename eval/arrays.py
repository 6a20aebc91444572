"""Arrays that may be larger than the memory to spend on them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAPPED_BYTES = 256 * 2**20


def empty(shape: tuple[int, int], folder: Path | None = None) -> NDArray[np.float32]:
    """An uninitialized float32 array: in memory, or above MAPPED_BYTES in a file of `folder` that is deleted with this process.

    The system can evict the pages of such a file when memory is short. `folder` None: the folder for temporary files.
    """
    if shape[0] * shape[1] * 4 <= MAPPED_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder, prefix="vectors-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
