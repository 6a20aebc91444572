"""Folding of scales, single decoder blocks, stored layers, and the loss that a run measures."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from qembed.checkpoint.awq_layout import dequantize, unpack
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.head import Head
from qembed.errors import BadInput
from qembed.quantize import awq, layer, layerwise, table
from qembed.quantize.batches import plain, with_prefixes
from qembed.quantize.blocks import INPUTS, LINEARS, DecoderLayer
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.hidden import OriginalStates, Stream
from qembed.quantize.parts import Parts
from qembed.quantize.products import calibration_dtype
from qembed.quantize.settings import QuantizationSettings, Report
from tests.checkpoints import MakeCheckpoint

pytestmark = pytest.mark.slow

LAST = Head("last", (), True)
FAMILIES = ["qwen3", "qwen2", "llama", "mistral"]


def layer_tensors(checkpoint: Checkpoint, number: int = 0) -> dict[str, torch.Tensor]:
    prefix = f"{checkpoint.prefix}layers.{number}."
    names = [name for name in checkpoint.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint.tensor(name).float() for name in names}


def hidden_states(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.randn(2, 9, checkpoint.config["hidden_size"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_scales_does_not_change_the_output(make_checkpoint: MakeCheckpoint, family: str) -> None:
    checkpoint = make_checkpoint(family)
    shape, block, hidden = shape_of(checkpoint, 64), DecoderLayer(checkpoint, torch.device("cpu")), hidden_states(checkpoint)
    tensors = layer_tensors(checkpoint)
    batch = plain([[0] * 9] * 2, range(2), tokens=100)[0]
    block.load(tensors)
    before = block.run(hidden, batch)
    generator = torch.Generator().manual_seed(1)
    folded_tensors = dict(tensors)
    for name in INPUTS:
        scales = torch.rand(shape.linear(name)[1], generator=generator) * 4 + 0.2
        sources = layer.channel_sources(name, shape, scales.device)
        scales = scales if sources is None else scales[sources]
        folded = layer.fold_scales(folded_tensors, name, scales, shape)
        torch.testing.assert_close(folded, scales, rtol=2e-3, atol=0)
        assert not torch.equal(folded_tensors[f"{name}.weight"], tensors[f"{name}.weight"])
    block.load(folded_tensors)
    torch.testing.assert_close(block.run(hidden, batch), before, rtol=1e-4, atol=1e-4)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(folded_tensors[name], folded_tensors[name].half().float())
        assert not torch.equal(folded_tensors[name], tensors[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_single_blocks_compute_the_same_as_the_complete_model(make_checkpoint: MakeCheckpoint, family: str) -> None:
    from transformers import AutoModel

    checkpoint = make_checkpoint(family)
    model = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = torch.tensor([[8, 8, 256, 0, 0], [5, 9, 77, 3, 256]])
    expected = model(input_ids=ids).last_hidden_state
    rows = [[8, 8, 256], [5, 9, 77, 3, 256]]
    stream = Stream.start(checkpoint.tensor("embed_tokens.weight"), plain(rows, range(2), tokens=100))
    block = DecoderLayer(checkpoint, torch.device("cpu"))
    for number in range(2):
        block.load(layer_tensors(checkpoint, number))
        stream.advance(block)
    vectors = stream.vectors(checkpoint.tensor("norm.weight").float(), 1e-6, LAST)
    last = torch.stack([expected[0, 2], expected[1, 4]])
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(last, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_in_bfloat16_keeps_the_residual_stream_and_its_norms_in_float32(
    make_checkpoint: MakeCheckpoint, family: str
) -> None:
    checkpoint = make_checkpoint(family)
    block, hidden = DecoderLayer(checkpoint, torch.device("cpu")), hidden_states(checkpoint)
    batch = plain([[0] * 9] * 2, range(2), tokens=100)[0]
    branches = {}
    for dtype in (torch.float32, torch.bfloat16):
        block.load(layer_tensors(checkpoint), dtype=dtype)
        assert block.linear("mlp.up_proj").weight.dtype == dtype
        assert block.module.input_layernorm.weight.dtype == torch.float32
        with torch.no_grad():
            after = block.run(hidden, batch)
        assert after.dtype == torch.float32
        branches[dtype] = after - hidden
    error = (branches[torch.bfloat16] - branches[torch.float32]).norm() / branches[torch.float32].norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_stored_integers_are_the_levels_of_rounding(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, rounding: str, group_size: int
) -> None:
    checkpoint = make_checkpoint()
    shape, block = shape_of(checkpoint, group_size), DecoderLayer(checkpoint, torch.device("cpu"))
    all_levels: list[torch.Tensor] = []
    dequantize_levels = awq.Grid.dequantize

    def spy(grid: awq.Grid, levels: torch.Tensor) -> torch.Tensor:
        all_levels.append(levels.clone())
        return dequantize_levels(grid, levels)

    monkeypatch.setattr(awq.Grid, "dequantize", spy)
    settings = QuantizationSettings(group_size=group_size, scales="none", clip=False, rounding=rounding)
    stream = Stream(plain([[0] * 9] * 2, range(2), tokens=100), [hidden_states(checkpoint)])
    quantizer = layer.LayerQuantizer(block, 0, layer_tensors(checkpoint), shape, settings, Report())
    stored = quantizer.run(stream, None)
    assert len(all_levels) == len(LINEARS)
    for name, levels in zip([linear for linears in INPUTS.values() for linear in linears], all_levels, strict=True):
        qweight, qzeros, scales = (stored[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
        outputs, inputs = shape.linear(name)
        assert qweight.shape == (inputs, outputs // 8)
        assert qzeros.shape == (inputs // group_size, outputs // 8)
        assert scales.shape == (inputs // group_size, outputs)
        assert scales.dtype == torch.float16
        assert torch.equal(unpack(qweight).T.float(), levels)
        torch.testing.assert_close(dequantize(qweight, qzeros, scales), quantizer.tensors[f"{name}.weight"], rtol=0, atol=0)
        assert f"{name}.weight" not in stored


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_layer_gives_the_hidden_states_of_the_run(make_checkpoint: MakeCheckpoint, family: str) -> None:
    checkpoint = make_checkpoint(family, **({"attention_bias": True} if family in ("qwen3", "llama") else {}))
    shape, block = shape_of(checkpoint, 64), DecoderLayer(checkpoint, torch.device("cpu"))
    batches = plain([[0] * 9] * 2, range(2), tokens=100)
    original, stream = Stream(batches, [hidden_states(checkpoint)]), Stream(batches, [hidden_states(checkpoint)])
    tensors = layer_tensors(checkpoint)
    block.load(tensors, dtype=calibration_dtype(block.device))
    before = list(original.hidden)
    states = OriginalStates(before, original.advance(block), original.hidden)
    stored = layer.LayerQuantizer(block, 0, tensors, shape, QuantizationSettings(group_size=64), Report()).run(stream, states)
    loaded = {name: tensor.float() for name, tensor in stored.items() if not name.endswith((".qweight", ".qzeros", ".scales"))}
    for name in LINEARS:
        loaded[f"{name}.weight"] = dequantize(*(stored[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")))
    block.load(loaded, dtype=calibration_dtype(block.device))
    with torch.no_grad():
        assert torch.equal(block.run(hidden_states(checkpoint), batches[0]), stream.hidden[0])
    assert not torch.allclose(stream.hidden[0], original.hidden[0], rtol=1e-3)


def test_fitting_layers_to_the_original_model_lowers_the_loss(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    shape, calibration = shape_of(checkpoint, 64), built_in(checkpoint, max_tokens=40, check=64, seed=3)
    loss = {}
    for target in ("original", "layer"):
        settings = QuantizationSettings(group_size=64, target=target)
        report = layerwise.quantize(checkpoint, shape, calibration, settings, torch.device("cpu"))
        loss[target] = 1 - statistics.fmean(report.cosines)
    assert loss["original"] < 0.9 * loss["layer"]


def test_layer_fitted_to_original_inputs_does_not_depend_on_earlier_layers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    shape, calibration = shape_of(checkpoint, 64), built_in(checkpoint, max_tokens=24, check=8, seed=3)
    tensors = {}
    for inputs in ("original", "quantized"):
        settings = QuantizationSettings(group_size=64, target="layer", inputs=inputs, rounding="rtn", mixed=0)
        folder = tmp_path / inputs
        folder.mkdir()
        layerwise.quantize(checkpoint, shape, calibration, settings, torch.device("cpu"), Parts(folder))
        part = Parts(folder).read("layer-001")
        assert part is not None
        tensors[inputs] = part[0]
    rows = [row for number, row in enumerate(calibration.rows) if number not in calibration.check]
    batches = with_prefixes(rows, range(len(rows)), 2048, prefixes=8, last_share=0.5, seed=3)
    stream, block = (
        Stream.start(checkpoint.tensor("embed_tokens.weight"), batches, in_half=True),
        DecoderLayer(checkpoint, torch.device("cpu")),
    )
    block.load(layer_tensors(checkpoint), dtype=calibration_dtype(block.device))
    stream.advance(block)
    settings = QuantizationSettings(group_size=64, target="layer", rounding="rtn")
    alone = layer.LayerQuantizer(block, 1, layer_tensors(checkpoint, 1), shape, settings, Report()).run(stream, None)
    assert all(torch.equal(tensors["original"][f"layers.1.{name}"], tensor) for name, tensor in alone.items())
    assert not all(torch.equal(tensors["quantized"][f"layers.1.{name}"], tensor) for name, tensor in alone.items())


def test_reported_cosines_are_those_of_the_written_tensors(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModel

    checkpoint = make_checkpoint()
    shape = shape_of(checkpoint, 64)
    calibration = built_in(checkpoint, max_tokens=40, check=8, seed=3)
    parts = Parts(tmp_path)
    report = layerwise.quantize(checkpoint, shape, calibration, QuantizationSettings(group_size=64), torch.device("cpu"), parts)
    written: dict[str, torch.Tensor] = {}
    for part in ("rest", "layer-000", "layer-001"):
        contents = parts.read(part)
        assert contents
        written.update(contents[0])
    models = [AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval() for _ in range(2)]
    state = {name: tensor.float() for name, tensor in written.items() if tensor.dtype == torch.float16 and "scales" not in name}
    for name in written:
        if name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            packed = (written[f"{linear}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
            state[f"{linear}.weight"] = dequantize(*packed)
    models[1].load_state_dict(state)
    expected = []
    for number in calibration.check:
        ids = torch.tensor([calibration.rows[number]])
        vectors = [torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state[0, -1], dim=0) for model in models]
        expected.append((vectors[0] @ vectors[1]).item())
    assert sorted(report.cosines) == pytest.approx(sorted(expected), abs=1e-4)
    assert max(report.cosines) < 0.99999


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e6, "too large")])
def test_value_outside_the_range_of_float16_is_refused_by_name(value: float, reason: str) -> None:
    tensor = torch.zeros(3)
    tensor[1] = value
    with pytest.raises(BadInput, match=f"layers.0.mlp.up_proj.weight.*{reason}"):
        table.half("layers.0.mlp.up_proj.weight", tensor)
