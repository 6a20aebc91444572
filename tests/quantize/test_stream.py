from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput
from qembed.packing import dequantize, unpack
from qembed.quantize import awq, stream
from qembed.quantize.blocks import INPUTS, LINEARS, Block
from qembed.quantize.calibration import batches, built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.parts import Parts

from .conftest import MakeCheckpoint

FAMILIES = ["qwen3", "qwen2", "llama", "mistral"]


def layer_tensors(checkpoint: Checkpoint, layer: int = 0) -> dict[str, torch.Tensor]:
    prefix = f"{checkpoint.prefix}layers.{layer}."
    return {n.removeprefix(prefix): checkpoint.tensor(n).float() for n in checkpoint.files if n.startswith(prefix)}


def hidden_states(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.randn(2, 9, checkpoint.config["hidden_size"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_scales_without_rounding_does_not_move_the_output(make_checkpoint: MakeCheckpoint, family: str) -> None:
    checkpoint = make_checkpoint(family)
    shape, block, hidden = shape_of(checkpoint, 64), Block(checkpoint, torch.device("cpu")), hidden_states(checkpoint)
    tensors = layer_tensors(checkpoint)
    block.load(tensors)
    before = block.run(hidden)
    generator = torch.Generator().manual_seed(1)
    scales = {name: torch.rand(shape.linear(name)[1], generator=generator) * 4 + 0.2 for name in INPUTS}
    channels = stream.value_channels(shape)
    scales["self_attn.o_proj"] = (torch.rand(int(channels.max()) + 1, generator=generator) * 4 + 0.2)[channels]
    folded_tensors = dict(tensors)
    folded = stream.fold(folded_tensors, scales, shape)
    block.load(folded_tensors)
    torch.testing.assert_close(block.run(hidden), before, rtol=1e-4, atol=1e-4)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(folded_tensors[name], folded_tensors[name].half().float())
        assert not torch.equal(folded_tensors[name], tensors[name])
    for name in INPUTS:
        torch.testing.assert_close(folded[name], scales[name], rtol=2e-3, atol=0)
        assert not torch.equal(folded_tensors[f"{name}.weight"], tensors[f"{name}.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_itself_computes_what_the_whole_model_computes(make_checkpoint: MakeCheckpoint, family: str) -> None:
    from transformers import AutoModel

    checkpoint = make_checkpoint(family)
    model = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 77, 3, 256], [8, 8, 256, 0, 0]])
    expected = model(input_ids=ids).last_hidden_state
    flow = stream.Stream.start(checkpoint.tensor("embed_tokens.weight"), [(ids, torch.tensor([5, 3]))])
    block = Block(checkpoint, torch.device("cpu"))
    for layer in range(2):
        block.load(layer_tensors(checkpoint, layer))
        flow.advance(block)
    vectors = flow.vectors(checkpoint.tensor("norm.weight").float(), 1e-6)
    last = torch.stack([expected[0, 4], expected[1, 2]])
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(last, dim=-1), rtol=1e-4, atol=1e-5)


def test_gram_matrices_are_those_of_the_tokens_without_padding(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    rows = [[1, 2, 3, 256], [4, 256], [7, 7, 256]]
    table = checkpoint.tensor("embed_tokens.weight")
    block = Block(checkpoint, torch.device("cpu"))
    tensors = layer_tensors(checkpoint)
    block.load(tensors)
    together = stream.collect(block, stream.Stream.start(table, batches(rows, range(3), tokens=100)))
    norm = tensors["input_layernorm.weight"]
    x = torch.cat([stream.rms_norm(table[torch.tensor(row)].float(), norm, 1e-6) for row in rows])
    torch.testing.assert_close(together["self_attn.q_proj"], x.T @ x, rtol=1e-4, atol=1e-4)
    alone = [stream.collect(block, stream.Stream.start(table, batches(rows, [i], tokens=100))) for i in range(3)]
    for name in INPUTS:
        torch.testing.assert_close(together[name], sum(gram[name] for gram in alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rounding", ["compensated", "nearest"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_stored_integers_are_those_that_were_chosen(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, rounding: str, group_size: int
) -> None:
    checkpoint = make_checkpoint()
    shape, block = shape_of(checkpoint, group_size), Block(checkpoint, torch.device("cpu"))
    tensors = layer_tensors(checkpoint)
    block.load(tensors)
    grams = stream.collect(block, stream.Stream([hidden_states(checkpoint)], [torch.tensor([9, 9])]))
    chosen: list[torch.Tensor] = []
    dequantize_levels = awq.Grid.dequantize

    def spy(grid: awq.Grid, levels: torch.Tensor) -> torch.Tensor:
        chosen.append(levels.clone())
        return dequantize_levels(grid, levels)

    monkeypatch.setattr(awq.Grid, "dequantize", spy)
    settings = stream.Settings(group_size=group_size, scales="none", clip=False, rounding=rounding)
    quantized, stored = stream.quantize_layer(tensors, grams, shape, settings, stream.Report())
    assert len(chosen) == len(LINEARS)
    for name, levels in zip([m for members in INPUTS.values() for m in members], chosen, strict=True):
        qweight, qzeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        outputs, inputs = shape.linear(name)
        assert qweight.shape == (inputs, outputs // 8)
        assert qzeros.shape == (inputs // group_size, outputs // 8)
        assert scales.shape == (inputs // group_size, outputs)
        assert scales.dtype == torch.float16
        assert torch.equal(unpack(qweight).T.float(), levels)
        torch.testing.assert_close(dequantize(qweight, qzeros, scales), quantized[f"{name}.weight"], rtol=0, atol=0)
        assert f"{name}.weight" not in stored


def test_measured_cosine_is_what_the_written_tensors_give(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModel

    checkpoint = make_checkpoint()
    shape = shape_of(checkpoint, 64)
    calibration = built_in(checkpoint, max_tokens=40, check=8, seed=3)
    parts = Parts(tmp_path)
    report = stream.quantize(checkpoint, shape, calibration, stream.Settings(group_size=64), torch.device("cpu"), parts)
    written: dict[str, torch.Tensor] = {}
    for part in ("rest", "layer-000", "layer-001"):
        found = parts.read(part)
        assert found
        written.update(found[0])
    models = [AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval() for _ in range(2)]
    state = {name: tensor.float() for name, tensor in written.items() if tensor.dtype == torch.float16 and "scales" not in name}
    for name in written:
        if name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            packed = (written[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales"))
            state[f"{linear}.weight"] = dequantize(*packed)
    models[1].load_state_dict(state)
    expected = []
    for number in calibration.check:
        ids = torch.tensor([calibration.rows[number]])
        vectors = [torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state[0, -1], dim=0) for model in models]
        expected.append((vectors[0] @ vectors[1]).item())
    assert sorted(report.cosines) == pytest.approx(sorted(expected), abs=1e-4)
    assert max(report.cosines) < 0.99999


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e6, "too great")])
def test_a_value_that_float16_cannot_hold_is_refused_by_name(value: float, reason: str) -> None:
    tensor = torch.zeros(3)
    tensor[1] = value
    with pytest.raises(BadInput, match=f"layers.0.mlp.up_proj.weight.*{reason}"):
        stream.half("layers.0.mlp.up_proj.weight", tensor)
