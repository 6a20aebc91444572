"""`qembed quantize --verify`: intact checkpoints pass, every kind of damage is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from qembed.cli import group
from qembed.quantize.manifest import sealed
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, contents, quantize

pytestmark = pytest.mark.slow


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(group, ["quantize", "--verify", *map(str, arguments)])


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Edit a tensor of a checkpoint and update the hash of its file, so that only the tensor is invalid."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edited = edit(tensors.pop(name))
    save_file(tensors if edited is None else {**tensors, name: edited.contiguous()}, path)
    manifest = json.loads((folder / "qembed.json").read_text())
    manifest["files"]["model.safetensors"] = contents(folder)["model.safetensors"]
    (folder / "qembed.json").write_text(json.dumps(sealed(manifest)))


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    source = make_checkpoint("qwen2", prefix="model.")
    assert quantize("--model", source.folder, "--output", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def test_intact_checkpoint_passes_with_the_recorded_cosine(checkpoint: Path, tmp_path: Path) -> None:
    result = verify(checkpoint, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    recorded = json.loads((checkpoint / "qembed.json").read_text())["fidelity"]
    assert report["findings"] == []
    assert report["source"] == "tiny-qwen2"
    assert report["fidelity"]["texts"] == 10
    assert recorded["min_cosine"] - 1e-4 <= report["fidelity"]["min_cosine"] <= report["fidelity"]["mean_cosine"] < 0.99999
    manifest = json.loads((checkpoint / "qembed.json").read_text())
    assert manifest.pop("float16")["overflows"] == []
    (checkpoint / "qembed.json").write_text(json.dumps(sealed(manifest)))  # as before that field existed
    assert json.loads(verify(checkpoint, "--json").stdout)["findings"] == []
    shutil.rmtree(tmp_path / "tiny-qwen2")
    result = verify(checkpoint)
    assert result.exit_code == 0
    assert "source not available" in result.stdout
    assert "problems: none" in result.stdout


def test_every_problem_is_one_line_that_names_it(checkpoint: Path) -> None:
    def assert_reported(*words: str) -> None:
        result = verify(checkpoint)
        assert result.exit_code == 1, result.output
        assert any(all(word in line for word in words) for line in result.stdout.splitlines()), result.stdout

    intact = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}

    def restore() -> None:
        for path, data in intact.items():
            path.write_bytes(data)

    linear = "model.layers.1.mlp.up_proj"
    (checkpoint / "tokenizer.json").write_bytes(intact[checkpoint / "tokenizer.json"] + b" ")
    assert_reported("tokenizer.json", "changed")
    (checkpoint / "tokenizer.json").unlink()
    assert_reported("tokenizer.json", "missing")
    restore()
    (checkpoint / "extra.safetensors").write_bytes(b"")
    assert_reported("extra.safetensors", "not part")
    (checkpoint / "extra.safetensors").unlink()
    (checkpoint / "model.safetensors").write_bytes(intact[checkpoint / "model.safetensors"][:-100])
    assert_reported("model.safetensors", "changed")
    assert_reported("model.safetensors", "damaged")
    for edit, words in (
        (lambda _: None, (f"{linear}.scales", "missing")),
        (lambda scales: scales.index_fill(0, torch.tensor([1]), -1), (f"{linear}.scales", "not positive")),
        (lambda scales: scales.index_fill(1, torch.tensor([3]), float("nan")), (f"{linear}.scales", "NaN")),
        (lambda scales: scales[:-1], (f"{linear}.scales", "[1, 256]", "[2, 256]")),
        (lambda scales: scales.float(), (f"{linear}.scales", "F32", "F16")),
    ):
        restore()
        change(checkpoint, f"{linear}.scales", edit)
        assert_reported(*words)
    restore()
    change(checkpoint, f"{linear}.qweight", lambda qweight: qweight.T)
    assert_reported(f"{linear}.qweight", "[32, 128]", "[128, 32]")
    restore()
    for layer in range(2):
        for name in ("gate_proj", "down_proj"):
            change(checkpoint, f"model.layers.{layer}.mlp.{name}.qweight", lambda qweight: qweight.flip(0))
    assert_reported("cosine", "tiny-qwen2")
    restore()
    (checkpoint / "qembed.json").write_text("[]")
    assert_reported("qembed.json", "not a JSON object")
    (checkpoint / "qembed.json").write_text('{"files": 5, "fidelity": [], "source": "x"}')
    assert_reported("qembed.json", "without hashes")
    restore()
    assert verify(checkpoint).exit_code == 0


def test_other_folders_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert_refused(verify(make_checkpoint().folder), "not an AWQ INT4 checkpoint")
    assert_refused(verify(tmp_path / "no" / "such"), "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(verify(tmp_path / "empty"), "config.json is missing")
    (tmp_path / "empty" / "config.json").write_text('{"quantization_config": "awq"}')
    assert_refused(verify(tmp_path / "empty"), "not an AWQ INT4 checkpoint")
    assert_refused(verify(tmp_path / "empty", "--force"), "--verify writes nothing", "--force")


def test_checkpoint_with_an_int8_table(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--token-table", "int8").exit_code == 0
    result = verify(tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "out" / "qembed.json").read_text())["fidelity"]
    assert json.loads(result.stdout)["fidelity"]["min_cosine"] >= recorded["min_cosine"] - 1e-4
    change(tmp_path / "out", "embed_tokens.scales", lambda scales: scales.index_fill(0, torch.tensor([5]), 0))
    assert "tensor embed_tokens.scales: a scale is not positive" in verify(tmp_path / "out").stdout
