"""Linux's permission to use AMX, the tiles of Intel's server CPUs.

A process has to ask for it before its first tile instruction, which otherwise ends the process (SIGILL). oneDNN asks before its
first product in bfloat16. vLLM's attention uses tiles and never asks, so an INT4 model, whose products are not oneDNN's, kills
its engine at the first text.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys

ARCH_PRCTL = 158
"""Number of the system call on x86-64."""
REQUEST_PERMISSION, TILE_DATA = 0x1023, 18
"""ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA (Linux, Documentation/arch/x86/xstate.rst)."""


def request_permission() -> bool:
    """Ask for this process, its threads and later forks; any number of times. False if there is no AMX, or none is allowed."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0
    return False
