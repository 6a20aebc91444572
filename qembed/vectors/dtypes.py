"""The formats in which vectors are stored: float32, float16, int8, or one bit per dimension. Functions of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qembed.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = ("float32", "float16", "int8", "binary")
INT8_MOST = 127
BITS = 8
"""Dimensions per byte of a binary vector."""


def encode(vectors: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Vectors [n, d] float32 in `dtype`, one of DTYPES.

    int8: each vector times 127 / max|x|, rounded to nearest, so that each uses the full range. The factor is not stored:
    vectors have length 1, so dividing the integers by their own length restores them. binary: one bit per dimension, 1 if
    above zero, eight per byte, the first in the highest bit: [n, d/8] uint8 (as `numpy.packbits`).
    """
    import numpy as np

    if dtype == "int8":
        most = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
        return np.rint(vectors * (INT8_MOST / np.where(most > 0, most, 1))).astype(np.int8)
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=1)
    return vectors.astype(dtype)


def decode(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Vectors [n, d] float32 from what `encode` returns, up to a positive factor per vector, which no cosine depends on.

    Bits become 1 and −1, so that the order of cosines is that of the numbers of equal bits.
    """
    import numpy as np

    if dtype == "binary":
        return np.unpackbits(stored, axis=1).astype(np.float32) * 2 - 1
    return stored.astype(np.float32, copy=False)


def width(dimensions: int, dtype: str) -> int:
    """The number of elements of a stored vector of `dimensions`.

    Raises:
        BadInput: binary, and the dimensions do not fill whole bytes.
    """
    if dtype != "binary":
        return dimensions
    if dimensions % BITS:
        raise BadInput(f"--output-dtype binary: {dimensions} dimensions do not fill whole bytes; a multiple of {BITS} does")
    return dimensions // BITS


def element(dtype: str) -> str:
    """numpy's name of the stored element type."""
    return "uint8" if dtype == "binary" else dtype
