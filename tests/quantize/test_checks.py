"""Damaged checkpoints: a one-line error, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint.description import INDEX, Checkpoint
from qembed.quantize import checks, parts
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, quantize


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


def assert_source_refused(checkpoint: Checkpoint, target: Path, *words: str) -> None:
    assert_refused(quantize("--model", checkpoint.folder, "--output", target), *words)
    assert not list(target.parent.iterdir())


def test_damaged_safetensors(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    source = make_checkpoint()
    path = source.folder / "model.safetensors"
    intact = path.read_bytes()
    for data in (
        intact[:-1000],
        intact[:4],
        b"",
        b"\xff" * 8 + intact[8:],
        intact[:8] + b"x" + intact[9:],
        (10).to_bytes(8, "little") + b'{"a":[1]} ',
    ):
        path.write_bytes(data)
        assert_source_refused(source, target, "model.safetensors", "damaged")
    path.unlink()
    assert_source_refused(source, target, "no model.safetensors")
    path.mkdir()
    assert_source_refused(source, target, "model.safetensors")


def test_values_that_float16_cannot_hold_are_refused_before_any_layer(
    make_checkpoint: MakeCheckpoint, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(dtype="bfloat16")
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    monkeypatch.setattr(parts.Parts, "write", lambda *_: pytest.fail("work has begun"))
    for name in ("layers.1.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"):
        for value, reason in ((float("nan"), "NaN"), (float("-inf"), "infinite"), (7e4, "too large for float16")):
            broken = tensors[name].clone()
            broken.view(-1)[-1] = value
            save_file({**tensors, name: broken}, path)
            assert_source_refused(source, target, name, reason)


def test_invalid_index(make_checkpoint: MakeCheckpoint, target: Path, tmp_path: Path) -> None:
    source = make_checkpoint(shards=2)
    index = source.folder / INDEX
    intact = json.loads(index.read_text())
    name = "layers.0.mlp.up_proj.weight"

    def write_index(shard: Any) -> None:
        index.write_text(json.dumps({"weight_map": {**intact["weight_map"], name: shard}}))

    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes((source.folder / "model-1.safetensors").read_bytes())
    (source.folder / "sub").mkdir()
    for shard in (
        str(outside),
        "../elsewhere.safetensors",
        "sub/../../elsewhere.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".",
    ):
        write_index(shard)
        assert_source_refused(source, target, INDEX, "outside the folder")
    for nonsense in (5, None, ["model-1.safetensors"]):
        write_index(nonsense)
        assert_source_refused(source, target, INDEX, "weight_map")
    write_index("model-7.safetensors")
    assert_source_refused(source, target, "model-7.safetensors", "missing")
    write_index("sub")
    assert_source_refused(source, target, "shard sub is missing")
    write_index("model-0.safetensors" if intact["weight_map"][name] == "model-1.safetensors" else "model-1.safetensors")
    assert_source_refused(source, target, name, "missing")
    index.write_text(json.dumps({"weight_map": {**intact["weight_map"], "more.weight": "model-0.safetensors"}}))
    assert_source_refused(source, target, "more.weight", "model-0.safetensors")
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        index.write_text(text)
        assert_source_refused(source, target)
    index.write_text(json.dumps(intact))
    (source.folder / "model-1.safetensors").unlink()
    assert_source_refused(source, target, "model-1.safetensors", "missing")
    os.symlink(tmp_path / "nowhere", source.folder / "model-1.safetensors")
    assert_source_refused(source, target, "model-1.safetensors", "missing")


def test_unexpected_tensors_shapes_and_dtypes(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    source = make_checkpoint()
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    for change, words in (
        ({"layers.0.mlp.up_proj.weight": torch.ones(256, 128, dtype=torch.int8)}, ("layers.0.mlp.up_proj.weight", "I8")),
        ({"layers.0.mlp.up_proj.weight": torch.ones(256, 127)}, ("layers.0.mlp.up_proj.weight", "[256, 127]")),
        ({"layers.0.self_attn.extra.weight": torch.ones(2)}, ("layers.0.self_attn.extra.weight", "unexpected", "qwen3")),
        ({"layers.5.mlp.up_proj.weight": torch.ones(2)}, ("layers.5.mlp.up_proj.weight", "unexpected", "qwen3")),
        ({"lm_head.weight": torch.ones(3, 128)}, ("lm_head.weight", "[3, 128]")),
    ):
        save_file({**tensors, **change}, path)
        assert_source_refused(source, target, *words)


def test_invalid_tokenizer(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    source = make_checkpoint()
    path = source.folder / "tokenizer.json"
    intact = json.loads(path.read_text())
    path.write_text(
        json.dumps({**intact, "model": {**intact["model"], "vocab": {"a": 1}, "merges": []}, "post_processor": None})
    )
    assert_source_refused(source, target, "makes no tokens")
    intact["added_tokens"][0]["id"] = 300
    intact["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"] = [300]
    path.write_text(json.dumps(intact))
    assert_source_refused(source, target, "300", "257")
    path.write_text("{}")
    assert_source_refused(source, target, "tokenizer.json", "not a tokenizer")
    path.unlink()
    assert_source_refused(source, target, "tokenizer.json is missing")


def test_unreadable_companion_file(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    source = make_checkpoint()
    (source.folder / "tokenizer_config.json").symlink_to("nowhere")
    assert_source_refused(source, target, "tokenizer_config.json", "cannot be read")


def test_a_companion_that_is_a_link_to_another_file_is_not_published(
    make_checkpoint: MakeCheckpoint, target: Path, tmp_path: Path
) -> None:
    source = make_checkpoint()
    (tmp_path / "secret").write_text("secret")
    (source.folder / "LICENSE-MIT").symlink_to(tmp_path / "secret")
    assert_source_refused(source, target, "LICENSE-MIT", "leads out of its folder")


def test_a_companion_that_is_a_pipe_is_not_opened(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    source = make_checkpoint()
    os.mkfifo(source.folder / "tokenizer_x")
    assert_source_refused(source, target, "tokenizer_x", "cannot be read")


def test_interrupt_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "check_values", interrupt)
    result = quantize("--model", make_checkpoint().folder, "--output", target)
    assert result.exit_code == 130
    assert result.stderr == "qembed: interrupted before anything was written\n"
    assert not list(target.parent.iterdir())
