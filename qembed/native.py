"""Shared libraries that the install compiles if it finds a C++ compiler: plain C interfaces, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec


def load(module: str) -> ctypes.CDLL | None:
    """The library that is installed as `module`; None if it was not built, or cannot be loaded here."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None


@functools.cache
def gomp_parallel() -> int | None:
    """The address of `GOMP_parallel` in torch's OpenMP, so that libraries compute in torch's threads; None without it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
