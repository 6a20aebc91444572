"""Memory that the C library keeps after tensors are freed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Give the pages of freed tensors back to the system, where the C library can (glibc).

    Between batches it is faster to keep them. Before large matrices are factorized they would add to the peak.
    """
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
