"""Quantizing on an NVIDIA GPU gives what it gives on a CPU, up to the order of sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qembed.checkpoint import awq_layout, int8_table
from qembed.checkpoint.find import find
from qembed.cli import group

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
SAME = 0.9
"""The share of integers that must be equal. Sums in another order choose another grid point or integer where two are close."""


def quantized(model: Path, output: Path, device: str) -> Path:
    arguments = ["quantize", "--model", str(model), "--output", str(output), "--device", device, "--max-tokens", "4000"]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    return output


def integers(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = find(str(folder))
    return {name: awq_layout.unpack(checkpoint.tensor(name)) for name in checkpoint.files if name.endswith(".qweight")}


def test_a_gpu_gives_nearly_the_integers_of_a_cpu_and_the_same_ones_twice(fp16: Path, tmp_path: Path) -> None:
    here, there, again = (
        integers(quantized(fp16, tmp_path / name, device)) for name, device in (("a", "cpu"), ("b", "cuda"), ("c", "cuda"))
    )
    equal = sum(int((here[name] == there[name]).sum()) for name in here)
    assert equal / sum(values.numel() for values in here.values()) > SAME
    assert all(torch.equal(there[name], again[name]) for name in there)


def test_what_a_gpu_has_written_is_verified_on_a_cpu(fp16: Path, tmp_path: Path) -> None:
    folder = quantized(fp16, tmp_path / "int4", "cuda")
    result = CliRunner().invoke(group, ["quantize", "--verify", str(folder), "--model", str(fp16), "--device", "cpu"])
    assert result.exit_code == 0, result.output


def test_packing_and_the_int8_table_are_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 16, (256, 64))
    assert torch.equal(awq_layout.pack(values.cuda()).cpu(), awq_layout.pack(values))
    table = torch.randn(300, 128).half()
    columns = int8_table.column_scales([table])
    weights, scales = int8_table.quantize(table, columns)
    on_gpu = int8_table.quantize(table.cuda(), columns.cuda())
    assert torch.equal(on_gpu[0].cpu(), weights)
    assert torch.equal(on_gpu[1].cpu(), scales)
