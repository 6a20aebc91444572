"""Memory that the C library keeps after tensors are freed."""

from __future__ import annotations

import contextlib
import ctypes


def trim() -> None:
    """Give the pages of freed tensors back to the system, where the C library can (glibc).

    Between batches it is faster to keep them. Before large matrices are factorized they would add to the peak.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
