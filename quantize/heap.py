"""Memory that the C library keeps after tensors are freed."""

from __future__ import annotations

import contextlib
import ctypes

LARGEST_FROM_HEAP = 32 * 2**20
"""Bytes from which a tensor is a mapping of its own, and goes back to the system when it is freed (`states.StoredStates`)."""
FREE_BYTES = 256 * 2**20
"""Free bytes that the C library keeps at the end of its heap."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep() -> None:
    """Let the C library keep freed memory until `trim`, where it can (glibc).

    Otherwise it returns tensors of some megabytes to the system, which clears each page when it is used again: for an operation
    on every element that takes longer than the operation.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        library.mallopt(M_TRIM_THRESHOLD, FREE_BYTES)


def trim() -> None:
    """Give the pages of freed tensors back to the system, where the C library can (glibc).

    Between batches it is faster to keep them. Before large matrices are factorized they would add to the peak.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
