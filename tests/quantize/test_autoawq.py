"""`--engine autoawq`. Tests that need the library are skipped if it is not installed; `make test-autoawq` runs them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from qembed.checkpoint.awq_layout import pack
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.cli import group
from qembed.quantize import autoawq
from qembed.quantize.blocks import DecoderLayer
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.parts import Parts
from qembed.quantize.settings import QuantizationSettings
from tests.checkpoints import MakeCheckpoint

needs_autoawq = pytest.mark.skipif(find_spec("awq") is None, reason="AutoAWQ is not installed; make test-autoawq")


def quantize(*arguments: str | Path) -> Result:
    fast = ("--group-size", "64", "--calibration-texts", "64", "--max-tokens", "64")
    return CliRunner().invoke(group, ["quantize", *fast, *map(str, arguments)])


def spread_channels(checkpoint: Checkpoint) -> None:
    """Scale the input channels of the linear layers unevenly, as in trained models, so that AWQ's scales are far from 1."""
    path = checkpoint.folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensors[name] = (tensor * torch.exp(0.7 * torch.randn(tensor.shape[1], generator=generator))).half()
    save_file(tensors, path)


def quantized_by_autoawq(source: Checkpoint, folder: Path) -> tuple[set[str], float]:
    """Quantize `source` on 16 short texts; returns the tensor names, and the mean of (1 − cosine) on 8 other texts."""
    every_text = built_in(source, max_tokens=40, check=0, seed=0)
    calibration = dataclasses.replace(every_text, rows=every_text.rows[:24], check=frozenset(range(16, 24)))
    shape, settings = shape_of(source, 64), QuantizationSettings(group_size=64, engine="autoawq")
    folder.mkdir()
    report = autoawq.quantize(source, shape, calibration, settings, torch.device("cpu"), Parts(folder))
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    return names, 1 - statistics.fmean(report.cosines)


def quantizer_without_model(kind: Any, group_size: int) -> Any:
    quantizer = object.__new__(kind)
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point, quantizer.duo_scaling = 4, group_size, True, True
    quantizer.n_parallel_calib_samples, quantizer.max_chunk_memory = None, 2**30
    return quantizer


def stock_quantizer(*_: Any) -> Any:
    from awq.quantize.quantizer import AwqQuantizer

    return AwqQuantizer


def test_missing_library_error_names_the_environment_to_create(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "awq", None)
    source = make_checkpoint()
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--engine", "autoawq")
    assert result.exit_code == 3, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("qembed: "))
    for word in ("autoawq 0.2.9", "transformers 4.51.3", "'.[autoawq]'"):
        assert word in line
    assert [path.name for path in tmp_path.iterdir()] == [source.folder.name]


@pytest.mark.parametrize("option", [("--scales", "awq"), ("--rounding", "rtn")])
def test_options_that_autoawq_lacks_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, option: tuple[str, str]
) -> None:
    source = make_checkpoint()
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--engine", "autoawq", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


@needs_autoawq
def test_widths_that_autoawq_cannot_pack_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=1, head_dim=40)
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--engine", "autoawq", "--group-size", "32")
    assert result.exit_code == 2, result.output
    assert "self_attn.k_proj has 40 outputs" in result.stderr


@pytest.mark.parametrize("lengths", [[3], [400, 512, 30, 7], [100] * 57, [700, 20], [511, 513]])
def test_block_length_fits_every_row_and_drops_fewest_tokens(lengths: list[int]) -> None:
    rows = [[1] * length for length in lengths]
    length, tokens = autoawq.block_length(rows), sum(lengths)
    assert max(lengths) <= length <= max(512, *lengths)
    assert tokens >= length
    assert tokens % length == min(tokens % other for other in range(max(lengths), max(max(lengths), min(512, tokens)) + 1))


def test_rope_parameters_of_transformers_5_work_with_transformers_4(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    block = DecoderLayer(checkpoint, torch.device("cpu"))
    expected = 5000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(block.rotary.inv_freq, expected)


@needs_autoawq
def test_output_format_equals_the_native_engines(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for engine in ("native", "autoawq"):
        result = quantize("--model", source.folder, "--output", tmp_path / engine, "--engine", engine, "--json")
        assert result.exit_code == 0, result.output
    native, awq = find(str(tmp_path / "native")), find(str(tmp_path / "autoawq"))
    assert awq.shapes() == native.shapes()
    assert awq.config == native.config
    assert {path.name for path in awq.folder.iterdir()} == {path.name for path in native.folder.iterdir()}
    assert awq.manifest["engine"] == {"name": "autoawq", "version": "0.2.9"}
    assert "rounding" not in awq.manifest["settings"]
    assert awq.manifest["calibration"] == native.manifest["calibration"]
    assert "AutoAWQ library, version 0.2.9" in (awq.folder / "README.md").read_text()
    assert json.loads(result.stdout)["fidelity"]["mean_cosine"] > 0.9
    assert any(not torch.equal(awq.tensor(name), native.tensor(name)) for name in native.files if name.endswith("qweight"))


@needs_autoawq
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_other_families(make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str) -> None:
    source = make_checkpoint(family, prefix="model.", dtype="bfloat16", num_key_value_heads=4)
    names, loss = quantized_by_autoawq(source, tmp_path / "parts")
    assert loss < 0.1
    assert {"model.norm.weight", *(f"model.layers.{layer}.self_attn.v_proj.qweight" for layer in (0, 1))} <= names


@needs_autoawq
@pytest.mark.parametrize(("quantizer", "restored"), [(autoawq.fixed_quantizer, True), (stock_quantizer, False)])
def test_only_the_fixed_scale_search_restores_the_weights(quantizer: Any, restored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 32, bias=False)
    inputs, sizes = torch.randn(4, 16, 128, generator=generator), torch.exp(torch.randn(128, generator=generator))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 128, generator=generator) * sizes)
        before, state_dict = linear.weight.clone(), linear.state_dict
        search = quantizer_without_model(quantizer(), group_size=64)
        search._search_best_scale(torch.nn.ModuleDict({"linear": linear}), linear, [linear], inputs)
    assert torch.equal(linear.weight, before) == restored
    assert linear.state_dict == state_dict


@needs_autoawq
def test_the_cpu_bug_triples_the_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    spread_channels(source)
    _, fixed = quantized_by_autoawq(source, tmp_path / "fixed")
    monkeypatch.setattr(autoawq, "fixed_quantizer", stock_quantizer)
    _, stock = quantized_by_autoawq(source, tmp_path / "stock")
    assert stock > 3 * fixed


@needs_autoawq
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(32, 128, 128), (64, 256, 64), (96, 96, 32)])
def test_packing_equals_autoawqs(outputs: int, inputs: int, group_size: int) -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM

    generator = torch.Generator().manual_seed(outputs)
    levels = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zero_points = torch.randint(0, 16, (outputs, inputs // group_size), generator=generator)
    scales = (torch.rand(outputs, inputs // group_size, generator=generator) + 0.1).half()
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    steps = levels.unflatten(1, (-1, group_size)) - zero_points[..., None]
    linear.weight.data = (steps * scales.float()[..., None]).flatten(1)
    packed = WQLinear_GEMM.from_linear(
        linear, w_bit=4, group_size=group_size, scales=scales.T.contiguous(), zeros=zero_points.T.contiguous()
    )
    assert torch.equal(packed.qweight, pack(levels.T))
    assert torch.equal(packed.qzeros, pack(zero_points.T))
    assert torch.equal(packed.scales, scales.T)
