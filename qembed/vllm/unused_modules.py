"""Modules that vLLM and transformers import if they are installed, and that an embedding engine never uses.

They take 150 MB and a third of the import time. A module that is None in sys.modules counts as missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNUSED = ("pandas", "scipy", "sklearn", "ray", "cv2")
TRACING = ("grpc", "opentelemetry")
TRACING_OPTION = "--otlp-traces-endpoint"
ON_GPU = ("triton",)
"""vLLM's CPU build has no use for it."""


def names(arguments: Iterable[str], *, on_cpu: bool) -> tuple[str, ...]:
    """The modules that an engine with these command-line `arguments` does not use."""
    traced = any(word.startswith(TRACING_OPTION) for word in arguments)
    return (*UNUSED, *(() if traced else TRACING), *(ON_GPU if on_cpu else ()))


def hide(modules: Iterable[str]) -> list[str]:
    """Make `modules` count as missing, except those that are imported already; returns the ones that are hidden now."""
    hidden = [name for name in modules if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    return hidden


@contextmanager
def hidden(modules: Iterable[str]) -> Iterator[None]:
    """Hide `modules` for the duration of the block, for a process that does more than run an engine."""
    names = hide(modules)
    try:
        yield
    finally:
        for name in names:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
