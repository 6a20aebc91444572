"""Parsing of devices."""

from __future__ import annotations

import pytest

from qembed.errors import BadInput
from qembed.vllm import devices


def test_devices_by_name_and_by_size() -> None:
    t4, gpu = devices.named("t4"), devices.named("4GiB")
    assert (t4.kind, t4.has_fp8, devices.named("L4").has_fp8, devices.named("A10G").has_fp8) == ("cuda", False, True, False)
    assert (gpu.kind, gpu.memory) == ("cuda", 4 * 2**30)
    assert (devices.named("cpu:8GiB").kind, devices.named("cpu:8GiB").free) == ("cpu", 8 * 2**30)
    with pytest.raises(BadInput, match="'H9000' is none of T4, L4, A10G"):
        devices.named("H9000")
    with pytest.raises(BadInput, match="tpu:8GiB"):
        devices.named("tpu:8GiB")
