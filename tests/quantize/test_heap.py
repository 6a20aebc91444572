"""Memory of freed tensors stays with the process between batches, and goes back to the system on demand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from qembed.quantize import heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "keep":
    heap.keep()
def compute():
    for _ in range(10):
        (torch.stack([x, x]) + (x + 1)).abs().exp().sum()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = torch.ones(3 * 2**20)
compute()
before = faults()
compute()
count = faults() - before
kept = resident()
heap.trim()
print(count, kept - resident())
"""


def _run(argument: str) -> tuple[int, int]:
    """The page faults of operations on tensors of 12 and 25 MB that ran before, and the bytes that `trim` gives back."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True)
    faults, trimmed = map(int, result.stdout.split())
    return faults, trimmed


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="not glibc")
def test_freed_tensors_are_used_again_without_page_faults_until_trimmed() -> None:
    faults, trimmed = _run("keep")
    faults_by_default, _ = _run("default")
    assert faults < faults_by_default / 5
    assert trimmed > 40e6
