"""`--engine autoawq`. What needs the library is skipped where it is not installed: `make test-autoawq` runs it."""

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

from .conftest import MakeCheckpoint

needs_autoawq = pytest.mark.skipif(find_spec("awq") is None, reason="AutoAWQ is not installed; make test-autoawq")


def quantize(*arguments: str | Path) -> Result:
    few = ("--group-size", "64", "--calibration-texts", "64", "--max-tokens", "64")
    return CliRunner().invoke(group, ["quantize", *few, *map(str, arguments)])


def make_uneven(checkpoint: Checkpoint) -> None:
    """Give the input channels of the linears different sizes, as trained models have: then the scales are far from 1."""
    path = checkpoint.folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensors[name] = (tensor * torch.exp(0.7 * torch.randn(tensor.shape[1], generator=generator))).half()
    save_file(tensors, path)


def quantized_by_autoawq(source: Checkpoint, folder: Path) -> tuple[set[str], float]:
    """The names of the tensors that AutoAWQ makes of `source` from a few short texts; the mean of (1 − cosine) on others."""
    whole = built_in(source, max_tokens=40, check=0, seed=0)
    calibration = dataclasses.replace(whole, rows=whole.rows[:24], check=frozenset(range(16, 24)))
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


def test_without_the_library_the_message_names_the_environment_that_it_needs(
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
def test_settings_that_autoawq_does_not_have_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, option: tuple[str, str]
) -> None:
    source = make_checkpoint()
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--engine", "autoawq", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


@needs_autoawq
def test_a_width_that_its_packing_cannot_take_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=1, head_dim=40)
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--engine", "autoawq", "--group-size", "32")
    assert result.exit_code == 2, result.output
    assert "self_attn.k_proj has 40 outputs" in result.stderr


@pytest.mark.parametrize("lengths", [[3], [400, 512, 30, 7], [100] * 57, [700, 20], [511, 513]])
def test_blocks_take_every_row_and_leave_next_to_nothing_over(lengths: list[int]) -> None:
    rows = [[1] * length for length in lengths]
    length, tokens = autoawq.block_length(rows), sum(lengths)
    assert max(lengths) <= length <= max(512, *lengths)
    assert tokens >= length
    assert tokens % length == min(tokens % other for other in range(max(lengths), max(max(lengths), min(512, tokens)) + 1))


def test_rotary_settings_of_transformers_5_are_not_lost_on_transformers_4(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    block = DecoderLayer(checkpoint, torch.device("cpu"))
    expected = 5000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(block.rotary.inv_freq, expected)


@needs_autoawq
def test_the_folder_is_that_of_our_own_engine(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for engine in ("native", "autoawq"):
        result = quantize("--model", source.folder, "--output", tmp_path / engine, "--engine", engine, "--json")
        assert result.exit_code == 0, result.output
    ours, theirs = find(str(tmp_path / "native")), find(str(tmp_path / "autoawq"))
    assert theirs.shapes() == ours.shapes()
    assert theirs.config == ours.config
    assert {path.name for path in theirs.folder.iterdir()} == {path.name for path in ours.folder.iterdir()}
    assert theirs.manifest["engine"] == {"name": "autoawq", "version": "0.2.9"}
    assert "rounding" not in theirs.manifest["settings"]
    assert theirs.manifest["calibration"] == ours.manifest["calibration"]
    assert "AutoAWQ library, version 0.2.9" in (theirs.folder / "README.md").read_text()
    assert json.loads(result.stdout)["fidelity"]["mean_cosine"] > 0.9
    assert any(not torch.equal(theirs.tensor(name), ours.tensor(name)) for name in ours.files if name.endswith("qweight"))


@needs_autoawq
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_other_families(make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str) -> None:
    source = make_checkpoint(family, prefix="model.", dtype="bfloat16", num_key_value_heads=4)
    written, lost = quantized_by_autoawq(source, tmp_path / "parts")
    assert lost < 0.1
    assert {"model.norm.weight", *(f"model.layers.{layer}.self_attn.v_proj.qweight" for layer in (0, 1))} <= written


@needs_autoawq
@pytest.mark.parametrize(("quantizer", "kept"), [(autoawq.fixed_quantizer, True), (stock_quantizer, False)])
def test_the_scale_search_leaves_the_weights_as_they_were_though_the_librarys_own_does_not(quantizer: Any, kept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 32, bias=False)
    inputs, sizes = torch.randn(4, 16, 128, generator=generator), torch.exp(torch.randn(128, generator=generator))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 128, generator=generator) * sizes)
        before, state_dict = linear.weight.clone(), linear.state_dict
        searching = quantizer_without_model(quantizer(), group_size=64)
        searching._search_best_scale(torch.nn.ModuleDict({"linear": linear}), linear, [linear], inputs)
    assert torch.equal(linear.weight, before) == kept
    assert linear.state_dict == state_dict


@needs_autoawq
def test_the_fault_would_cost_the_vectors_dearly(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    make_uneven(source)
    _, mended = quantized_by_autoawq(source, tmp_path / "mended")
    monkeypatch.setattr(autoawq, "fixed_quantizer", stock_quantizer)
    _, stock = quantized_by_autoawq(source, tmp_path / "stock")
    assert stock > 3 * mended


@needs_autoawq
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(32, 128, 128), (64, 256, 64), (96, 96, 32)])
def test_the_same_integers_are_the_same_bytes_in_both_packings(outputs: int, inputs: int, group_size: int) -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM

    generator = torch.Generator().manual_seed(outputs)
    levels = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zero_points = torch.randint(0, 16, (outputs, inputs // group_size), generator=generator)
    scales = (torch.rand(outputs, inputs // group_size, generator=generator) + 0.1).half()
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    steps = levels.unflatten(1, (-1, group_size)) - zero_points[..., None]
    linear.weight.data = (steps * scales.float()[..., None]).flatten(1)
    theirs = WQLinear_GEMM.from_linear(
        linear, w_bit=4, group_size=group_size, scales=scales.T.contiguous(), zeros=zero_points.T.contiguous()
    )
    assert torch.equal(theirs.qweight, pack(levels.T))
    assert torch.equal(theirs.qzeros, pack(zero_points.T))
    assert torch.equal(theirs.scales, scales.T)
