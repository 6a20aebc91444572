"""Parsing of sizes and devices."""

from __future__ import annotations

import pytest

from qembed import sizes
from qembed.errors import BadInput
from qembed.vllm import devices


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GiB", 3 * 2**30), ("3 gib", 3 * 2**30), ("3G", 3 * 2**30), ("3GB", 3 * 10**9), ("1.5MiB", 3 * 2**19), ("512", 512)],
)
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "3XB", "-1GiB", "0", "1e9", "3 G B", "0.1"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no size"):
        sizes.parse(text)


def test_devices_by_name_and_by_size() -> None:
    t4, gpu = devices.named("t4"), devices.named("4GiB")
    assert (t4.kind, t4.has_fp8, devices.named("L4").has_fp8, devices.named("A10G").has_fp8) == ("cuda", False, True, False)
    assert (gpu.kind, gpu.memory) == ("cuda", 4 * 2**30)
    assert (devices.named("cpu:8GiB").kind, devices.named("cpu:8GiB").free) == ("cpu", 8 * 2**30)
    with pytest.raises(BadInput, match="'H9000' is none of T4, L4, A10G"):
        devices.named("H9000")
    with pytest.raises(BadInput, match="tpu:8GiB"):
        devices.named("tpu:8GiB")
