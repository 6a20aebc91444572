"""`qembed quantize --verify`: what it finds, and what it takes for good."""

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

from .conftest import MakeCheckpoint, assert_refused, contents, quantize

pytestmark = pytest.mark.slow


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(group, ["quantize", "--verify", *map(str, arguments)])


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Edit one tensor of a checkpoint, and note the file's new hash, so that only the tensor is wrong."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edited = edit(tensors.pop(name))
    save_file(tensors if edited is None else {**tensors, name: edited.contiguous()}, path)
    card = json.loads((folder / "qembed.json").read_text())
    card["files"]["model.safetensors"] = contents(folder)["model.safetensors"]
    (folder / "qembed.json").write_text(json.dumps(card))


@pytest.fixture
def made(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    source = make_checkpoint("qwen2", prefix="model.")
    assert quantize("--model", source.folder, "--output", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def test_a_good_checkpoint_is_good_and_its_cosine_the_one_noted(made: Path, tmp_path: Path) -> None:
    result = verify(made, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    noted = json.loads((made / "qembed.json").read_text())["fidelity"]
    assert found["findings"] == []
    assert found["source"] == "tiny-qwen2"
    assert found["fidelity"]["texts"] == 10
    assert noted["min_cosine"] - 1e-4 <= found["fidelity"]["min_cosine"] <= found["fidelity"]["mean_cosine"] < 0.99999
    shutil.rmtree(tmp_path / "tiny-qwen2")
    result = verify(made)
    assert result.exit_code == 0
    assert "source not at hand" in result.stdout
    assert "nothing wrong" in result.stdout


def test_everything_that_is_wrong_is_a_line_that_names_it(made: Path) -> None:
    def found(*words: str) -> None:
        result = verify(made)
        assert result.exit_code == 1, result.output
        assert any(all(word in line for word in words) for line in result.stdout.splitlines()), result.stdout

    whole = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}

    def mend() -> None:
        for path, data in whole.items():
            path.write_bytes(data)

    linear = "model.layers.1.mlp.up_proj"
    (made / "tokenizer.json").write_bytes(whole[made / "tokenizer.json"] + b" ")
    found("tokenizer.json", "changed")
    (made / "tokenizer.json").unlink()
    found("tokenizer.json", "missing")
    mend()
    (made / "extra.safetensors").write_bytes(b"")
    found("extra.safetensors", "not part")
    (made / "extra.safetensors").unlink()
    (made / "model.safetensors").write_bytes(whole[made / "model.safetensors"][:-100])
    found("model.safetensors", "changed")
    found("model.safetensors", "damaged")
    for edit, words in (
        (lambda _: None, (f"{linear}.scales", "missing")),
        (lambda scales: scales.index_fill(0, torch.tensor([1]), -1), (f"{linear}.scales", "not positive")),
        (lambda scales: scales.index_fill(1, torch.tensor([3]), float("nan")), (f"{linear}.scales", "NaN")),
        (lambda scales: scales[:-1], (f"{linear}.scales", "[1, 256]", "[2, 256]")),
        (lambda scales: scales.float(), (f"{linear}.scales", "F32", "F16")),
    ):
        mend()
        change(made, f"{linear}.scales", edit)
        found(*words)
    mend()
    change(made, f"{linear}.qweight", lambda qweight: qweight.T)
    found(f"{linear}.qweight", "[32, 128]", "[128, 32]")
    mend()
    for layer in range(2):
        for name in ("gate_proj", "down_proj"):
            change(made, f"model.layers.{layer}.mlp.{name}.qweight", lambda qweight: qweight.flip(0))
    found("cosine", "tiny-qwen2")
    mend()
    (made / "qembed.json").write_text("[]")
    found("qembed.json", "not a JSON object")
    (made / "qembed.json").write_text('{"files": 5, "fidelity": [], "source": "x"}')
    found("qembed.json", "without hashes")
    mend()
    assert verify(made).exit_code == 0


def test_what_is_no_int4_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert_refused(verify(make_checkpoint().folder), "not an AWQ INT4 checkpoint")
    assert_refused(verify(tmp_path / "no" / "such"), "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(verify(tmp_path / "empty"), "config.json is missing")
    (tmp_path / "empty" / "config.json").write_text('{"quantization_config": "awq"}')
    assert_refused(verify(tmp_path / "empty"), "not an AWQ INT4 checkpoint")
    assert_refused(verify(tmp_path / "empty", "--force"), "--verify writes nothing", "--force")


def test_a_checkpoint_with_an_int8_table(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--token-table", "int8").exit_code == 0
    result = verify(tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    noted = json.loads((tmp_path / "out" / "qembed.json").read_text())["fidelity"]
    assert json.loads(result.stdout)["fidelity"]["min_cosine"] >= noted["min_cosine"] - 1e-4
    change(tmp_path / "out", "embed_tokens.scales", lambda scales: scales.index_fill(0, torch.tensor([5]), 0))
    assert "tensor embed_tokens.scales: a scale is not positive" in verify(tmp_path / "out").stdout
