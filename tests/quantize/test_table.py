"""`qembed quantize --token-table int8`: stored tensors, reported error, calibration inputs, and refusal by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint import int8_table
from qembed.checkpoint.awq_layout import PACK
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.quantize import table
from qembed.quantize.blocks import LINEARS, Architecture
from qembed.quantize.hidden import Stream
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, quantize

pytestmark = pytest.mark.slow

TABLE = "embed_tokens.weight"
QUICK = ("--scales", "none", "--no-clip", "--rounding", "rtn")


def quantize_int8(source: Checkpoint, target: Path) -> dict[str, Any]:
    """Quantize with an INT8 table; returns the summary."""
    result = quantize("--model", source.folder, "--output", target, "--token-table", "int8", "--json", *QUICK)
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def test_table_is_stored_in_int8_and_its_error_reported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    summary = quantize_int8(source, tmp_path / "out")
    checkpoint = find(str(tmp_path / "out"))
    assert checkpoint.is_int4
    assert checkpoint.has_int8_table
    quantization = checkpoint.config["quantization_config"]
    assert (quantization["quant_method"], quantization["token_table"]) == ("qembed_awq", "int8")
    assert (quantization["bits"], quantization["group_size"], quantization["version"]) == (4, 64, "gemm")
    stored = {name: tensor for name, tensor in checkpoint.shapes().items() if name.startswith("embed_tokens.")}
    assert stored == {
        "embed_tokens.qweight": ([257, 128], "I8"),
        "embed_tokens.scales": ([257, 1], "F32"),
        "embed_tokens.column_scales": ([128], "F32"),
        TABLE: ([0], "F16"),
    }
    original = source.tensor(TABLE).double()
    restored = int8_table.dequantize(*(checkpoint.tensor(f"embed_tokens.{part}") for part in int8_table.TENSORS))
    error = ((restored - original).norm() / original.norm()).item()
    assert 0 < error < 0.008
    assert summary["token_table"] == {"stored": "int8", "relative_error": pytest.approx(error, abs=1e-6)}
    assert checkpoint.manifest["token_table"] == summary["token_table"]
    assert summary["bytes"]["token_table"] == {"before": 257 * 128 * 2, "after": 257 * 128 + 257 * 4 + 128 * 4}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"relative error {error:.2%}" in card
    assert "needs qembed's vLLM plugin" in card
    assert "qembed_awq" in card


def test_default_table_is_float16(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--json", *QUICK)
    assert json.loads(result.stdout)["token_table"] == {"stored": "float16", "relative_error": None}
    checkpoint = find(str(tmp_path / "out"))
    assert not checkpoint.has_int8_table
    assert checkpoint.config["quantization_config"]["quant_method"] == "awq"
    for name in ("config.json", "qembed.json"):
        assert "token_table" not in (checkpoint.folder / name).read_text()
    card = (checkpoint.folder / "README.md").read_text()
    assert "everything\nelse in float16: " in card
    assert "plugin" not in card


def test_error_is_printed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    result = quantize("--model", make_checkpoint().folder, "--output", tmp_path / "out", "--token-table", "int8", *QUICK)
    assert "relative error of the token table" in result.stdout


@pytest.mark.parametrize(("prefix", "dtype"), [("model.", "bfloat16"), ("", "float32")])
def test_prefixes_dtypes_and_a_separate_output_head(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, prefix: str, dtype: str
) -> None:
    source = make_checkpoint("qwen2", prefix=prefix, dtype=dtype, tie_word_embeddings=False)
    tensors = load_file(source.folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(257, 128).to(getattr(torch, dtype))
    save_file(tensors, source.folder / "model.safetensors")
    quantize_int8(find(str(source.folder)), tmp_path / "out")
    checkpoint = find(str(tmp_path / "out"))
    assert checkpoint.prefix == prefix
    assert checkpoint.shapes()[f"{prefix}embed_tokens.qweight"] == ([257, 128], "I8")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tensors["lm_head.weight"].half())


def test_table_is_read_in_blocks(make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read_tensor = make_checkpoint(), Checkpoint.tensor
    heights: list[int] = []

    def tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        assert name != TABLE
        return read_tensor(checkpoint, name)

    def column_scales(blocks: Any) -> torch.Tensor:
        block_list = list(blocks)
        heights.extend(len(block) for block in block_list)
        return torch.ones(block_list[0].shape[1])

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    monkeypatch.setattr(int8_table, "BLOCK_ROWS", 100)
    monkeypatch.setattr(int8_table, "column_scales", column_scales)
    quantize_int8(source, tmp_path / "out")
    assert heights == [100, 100, 57]


def test_float16_table_and_output_head_are_read_in_blocks(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read_tensor = make_checkpoint("llama", prefix="model.", tie_word_embeddings=False), Checkpoint.tensor
    tensors = load_file(source.folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(257, 128).bfloat16()
    save_file(tensors, source.folder / "model.safetensors")

    def tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        assert name not in (f"model.{TABLE}", "lm_head.weight")
        return read_tensor(checkpoint, name)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "tensor", tensor)
        patched.setattr(int8_table, "BLOCK_ROWS", 100)
        assert quantize("--model", source.folder, "--output", tmp_path / "out", *QUICK).exit_code == 0
    checkpoint = find(str(tmp_path / "out"))
    for name in (f"model.{TABLE}", "lm_head.weight"):
        assert torch.equal(checkpoint.tensor(name), tensors[name].half())


def test_only_the_quantized_stream_starts_from_the_int8_table(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, start = make_checkpoint(), Stream.start
    seen: list[table.Rows] = []
    monkeypatch.setattr(Stream, "start", lambda rows, *rest, **options: (seen.append(rows), start(rows, *rest, **options))[1])
    quantize_int8(source, tmp_path / "out")
    checkpoint = find(str(tmp_path / "out"))
    restored = int8_table.dequantize(*(checkpoint.tensor(f"embed_tokens.{part}") for part in int8_table.TENSORS))
    quantized, original, check, check_original = seen
    assert quantized.ids.tolist() == sorted(set(quantized.ids.tolist()))
    assert 0 in quantized.ids
    stored = source.tensor(TABLE).float()
    for rows, expected in ((quantized, restored), (check, restored), (original, stored), (check_original, stored)):
        assert torch.equal(rows[rows.ids.flip(0)[None]].float(), expected[rows.ids.flip(0)][None])


def test_table_with_infinite_values_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    tensors = load_file(source.folder / "model.safetensors")
    tensors[TABLE][200, 3] = float("inf")
    save_file(tensors, source.folder / "model.safetensors")
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--token-table", "int8", *QUICK)
    assert_refused(result, TABLE, "infinite")
    assert not (tmp_path / "out").exists()


def test_transformers_refuses_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Without the empty tensor it would fill the table with random numbers and continue."""
    from transformers import AutoModel

    quantize_int8(make_checkpoint(), tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModel.from_pretrained(tmp_path / "out")


def test_redundant_tokenizer_files_are_left_out(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (source.folder / name).write_text("{}")
    quantize_int8(source, tmp_path / "int8")
    assert quantize("--model", source.folder, "--output", tmp_path / "float16", *QUICK).exit_code == 0
    names = {path.name for path in (tmp_path / "float16").iterdir()}
    assert names - {path.name for path in (tmp_path / "int8").iterdir()} == {"vocab.json", "merges.txt"}


def test_the_0_6b_fits_into_400_mb() -> None:
    """Computed from shapes: 28 layers in groups of 128, the table, and 12 MB for the tokenizer.json of Qwen3-Embedding."""
    shape = Architecture(layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocabulary=151_669)
    linears = 0
    for name in LINEARS:
        outputs, inputs = shape.linear(name)
        groups = inputs // 128
        linears += 4 * inputs * outputs // PACK + 4 * groups * outputs // PACK + 2 * groups * outputs
    norms = 2 * (2 * shape.hidden + 2 * shape.head_dim)
    qweight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.int8, device="meta")
    parts = table.int8_tensors(TABLE, qweight, torch.empty(shape.vocabulary, 1, device="meta"), torch.empty(shape.hidden))
    embeddings = sum(part.numel() * part.element_size() for part in parts.values())
    assert shape.layers * (linears + norms) + 2 * shape.hidden + embeddings < 400e6 - 12e6
