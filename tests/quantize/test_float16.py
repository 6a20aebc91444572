"""Checkpoints whose hidden states overflow float16: what can be scaled is scaled, and what cannot is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qembed.checkpoint.awq_layout import dequantize
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.checkpoint.float16 import overflow
from qembed.cli import group
from qembed.quantize import layerwise, ranges
from qembed.quantize.batches import plain
from qembed.quantize.blocks import LINEARS, DecoderLayer
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.hidden import Stream
from qembed.quantize.layer import LayerQuantizer
from qembed.quantize.parts import Parts
from qembed.quantize.products import calibration_dtype
from qembed.quantize.settings import QuantizationSettings, Report
from tests.checkpoints import MakeCheckpoint

from .conftest import quantize

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TEXTS = ("Rust is a language", "import numpy", "What is the capital of France?", "a" * 40, "größe")
POWER = 2.0**13


def change(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy `source` to `folder` with its tensors in float32, edited."""
    shutil.copytree(source, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """The sample, with channels between up_proj and down_proj, and between v_proj and o_proj, that float16 cannot hold.

    down_proj and o_proj undo what is multiplied before them, so that in float32 it is still the sample.
    """

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp.up_proj.weight"][192:256] *= POWER
        tensors["layers.1.mlp.down_proj.weight"][:, 192:256] /= POWER
        tensors["layers.0.self_attn.v_proj.weight"][:128] *= POWER  # the first of two key-value heads, of two heads each
        tensors["layers.0.self_attn.o_proj.weight"][:, :256] /= POWER

    return change(find("sample").folder, tmp_path / "overflowing", edit)


def model_vectors(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The last hidden states [texts, hidden] of TEXTS by transformers in `dtype`, from an original or INT4 checkpoint."""
    from transformers import AutoConfig, AutoModel

    stored = {name: checkpoint.tensor(name) for name in checkpoint.files}
    state = {name: tensor for name, tensor in stored.items() if not name.endswith((".qweight", ".qzeros", ".scales"))}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        state[f"{name}.weight"] = dequantize(*(stored[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")))
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = AutoModel.from_config(config).eval()
    model.load_state_dict(state)
    model.to(dtype)
    tokenizer = checkpoint.tokenizer()
    with torch.no_grad():
        last = [model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1] for text in TEXTS]
    return torch.stack(last).float()


def test_what_overflows_between_linear_layers_is_scaled_and_float16_gives_the_vectors_of_float32(
    overflowing: Path, tmp_path: Path
) -> None:
    source = find(str(overflowing))
    assert not torch.isfinite(model_vectors(source, torch.float16)).any()
    exact = model_vectors(source, torch.float32)
    result = quantize("--model", overflowing, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    int4 = find(str(tmp_path / "out"))
    in_float16, in_float32 = (model_vectors(int4, dtype) for dtype in (torch.float16, torch.float32))
    assert torch.cosine_similarity(in_float16, in_float32).min() >= 0.999
    assert torch.cosine_similarity(in_float16, exact).min() >= 0.9
    record = int4.manifest["float16"]
    assert set(record["scaled"]) == {"layers.0.self_attn.v_proj", "layers.1.mlp.up_proj"}
    assert record["overflows"] == []
    assert overflow(int4.manifest) is None
    assert max(record["largest"]["mlp.down_proj"]["input"]) <= ranges.SCALED_TO
    assert [len(record["largest"][name][side]) for name in LINEARS for side in ("input", "output")] == [6] * 14
    assert "layers.0.self_attn.v_proj, layers.1.mlp.up_proj" in (int4.folder / "README.md").read_text()
    assert "layers.1.mlp.up_proj ÷" in result.stdout


def test_without_scaling_float16_gives_nan(overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SCALED_TO", float("inf"))
    assert quantize("--model", overflowing, "--output", tmp_path / "out").exit_code == 0
    int4 = find(str(tmp_path / "out"))
    assert not torch.isfinite(model_vectors(int4, torch.float16)).all()
    reason = overflow(int4.manifest)
    assert reason
    assert "the input of mlp.down_proj" in reason or "the output of mlp.up_proj" in reason


def test_a_residual_stream_that_overflows_is_told_and_float16_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp.up_proj.weight"][:5] *= 30_000

    source = change(make_checkpoint().folder, tmp_path / "source", edit)
    assert not torch.isfinite(model_vectors(find(str(source)), torch.float16)).all()
    result = quantize("--model", source, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "not in float16" in result.stdout
    record = json.loads((tmp_path / "out" / "qembed.json").read_text())["float16"]
    assert record["largest"]["residual"][1] > 65504 > record["largest"]["residual"][0]
    assert any("the residual stream" in line and "layer 1" in line for line in record["overflows"])
    assert "**Not in float16**" in (tmp_path / "out" / "README.md").read_text()
    plan = ["serve", "--plan", "--model", str(tmp_path / "out"), "--device-memory"]
    refused = CliRunner().invoke(group, [*plan, "T4"])
    assert refused.exit_code == 2, refused.output
    assert "residual stream" in refused.stderr
    assert "T4 has no bfloat16" in refused.stderr
    assert "bfloat16" in CliRunner().invoke(group, [*plan, "L4"]).stdout


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_scaling_changes_nothing_but_exponents(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, family: str, group_size: int
) -> None:
    checkpoint = make_checkpoint(family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}))
    shape, block = shape_of(checkpoint, group_size), DecoderLayer(checkpoint, CPU)
    batches = plain([[0] * 9] * 2, range(2), tokens=100)
    hidden = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))
    tensors = {name.removeprefix("layers.0."): checkpoint.tensor(name).float() for name in checkpoint.files if "s.0." in name}
    stored, states = {}, {}
    settings = QuantizationSettings(group_size=group_size)
    for limit in (float("inf"), 0.125):
        monkeypatch.setattr(ranges, "SCALED_TO", limit)
        stream = Stream(batches, [hidden.clone()])
        quantizer = LayerQuantizer(block, 0, tensors, shape, settings, Report())
        stored[limit], states[limit] = quantizer.run(stream, None), stream.hidden[0]
    assert set(quantizer.ranges.scaled) == {"self_attn.v_proj", "mlp.up_proj"}
    assert quantizer.ranges.inputs["mlp.down_proj"].max() <= 0.125
    assert quantizer.ranges.outputs["self_attn.v_proj"].max() <= 0.125
    before, after = stored.values()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    linears = [f"{linear}.scales" for linear in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    biases = [name for name in ("self_attn.v_proj.bias", "mlp.up_proj.bias") if name in before]
    assert changed == {*linears, *biases}
    for name in linears:
        mantissas = torch.frexp(after[name].float() / before[name].float()).mantissa
        assert torch.equal(mantissas, torch.full_like(mantissas, 0.5))
    torch.testing.assert_close(states[0.125], states[float("inf")], rtol=1e-6, atol=1e-6)
    block.load(layerwise.dequantize_layer(after), dtype=calibration_dtype(CPU))
    with torch.no_grad():
        torch.testing.assert_close(block.run(hidden, batches[0]), states[float("inf")], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_layers_of_another_quantizer_are_scaled_too(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    checkpoint = make_checkpoint(family)
    shape, calibration = shape_of(checkpoint, 64), built_in(checkpoint, max_tokens=24, check=8, seed=3)
    settings = QuantizationSettings(group_size=64, target="layer", prefixes=0, mixed=0)

    def run() -> Report:
        return layerwise.quantize(checkpoint, shape, calibration, settings, CPU, Parts(tmp_path))

    def parts() -> list[dict[str, torch.Tensor]]:
        return [part[0] for name in ("layer-000", "layer-001") if (part := Parts(tmp_path).read(name))]

    monkeypatch.setattr(ranges, "SCALED_TO", float("inf"))
    unscaled = run()
    before = parts()
    for number, tensors in enumerate(before):
        Parts(tmp_path).write(f"layer-{number:03d}", tensors, {})  # as AutoAWQ's are written
    monkeypatch.setattr(ranges, "SCALED_TO", 0.125)
    scaled = run()
    after = parts()
    assert scaled.cosines == pytest.approx(unscaled.cosines, abs=1e-6)
    assert set(scaled.scaled) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.up_proj", "self_attn.v_proj")}
    assert max(pair[0] for pair in scaled.largest["mlp.down_proj"]) <= 0.125
    assert max(pair[0] for pair in unscaled.largest["mlp.down_proj"]) > 0.125
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old if name.endswith((".qweight", ".qzeros")))
        assert not all(torch.equal(old[name], new[name]) for name in old if name.endswith("scales"))
    resumed = run()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in parts()[0].items())
    assert (resumed.largest, resumed.scaled) == (scaled.largest, scaled.scaled)


def test_powers_are_shared_by_groups_and_by_heads() -> None:
    largest = torch.tensor([1.0, 2.0**15, 0.0, 3.0] + [5.0] * 4)
    alone = torch.arange(8)
    assert ranges.safe_divisors(largest, 2, alone).tolist() == [4, 4, 1, 1, 1, 1, 1, 1]
    shared = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    assert ranges.safe_divisors(largest, 2, shared).tolist() == [4, 4, 1, 1, 4, 4, 1, 1]
    assert ranges.safe_divisors(largest, 4, shared).tolist() == [4] * 8
    assert ranges.safe_divisors(torch.tensor([float("nan"), 8192.0]), 1, torch.arange(2)).tolist() == [1, 1]
