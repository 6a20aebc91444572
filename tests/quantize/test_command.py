"""`qembed quantize` as a user meets it: what it writes, what it refuses, what it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find, source_of
from qembed.quantize import parts, stream, writer
from qembed.quantize.cli import Rounding
from qembed.quantize.model_card import OF_AWQ

from .conftest import MakeCheckpoint, assert_refused, contents, quantize

pytestmark = pytest.mark.slow


def rewrite(checkpoint: Checkpoint, change: dict[str, torch.Tensor | None]) -> None:
    path = checkpoint.folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_the_folder_is_whole_and_says_what_it_is(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source.folder / "modules.json").write_text("[]")
    (source.folder / "1_Pooling").mkdir()
    (source.folder / "1_Pooling" / "config.json").write_text("{}")
    target = tmp_path / "out"
    result = quantize("--model", source.folder, "--output", target, "--json")
    assert result.exit_code == 0, result.output
    made = find(str(target))
    assert made.is_int4
    assert made.config["quantization_config"] | {"modules_to_not_convert": None} == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    assert {path.name for path in target.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling", "README.md", "qembed.json",
    }  # fmt: skip
    assert find(source_of(made)).folder == source.folder
    for name, digest in made.manifest["files"].items():
        assert contents(target)[name] == digest
    assert made.manifest["source"]["sha256"]["model.safetensors"] == contents(source.folder)["model.safetensors"]
    assert made.manifest["calibration"]["tokens"] > 1000
    fidelity = json.loads(result.stdout)["fidelity"]
    card = (target / "README.md").read_text()
    assert f"{fidelity['mean_cosine']:.4f}" in card
    results = (Path(__file__).parents[2] / "bench" / "RESULTS.md").read_text()
    row = next(
        line for line in results.split("Quality of INT4: a language model")[1].splitlines() if line.startswith("| **qembed**")
    )
    assert [f"({share})" in row and share in card for share in OF_AWQ.values()] == [True] * 3
    assert not list(tmp_path.glob(".*"))
    dtypes = {dtype for name, (_, dtype) in made.shapes().items() if "proj" not in name}
    assert dtypes == {"F16"}


def test_rope_theta_stands_where_both_transformers_read_it() -> None:
    for config in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}):
        made = writer.int4_config(config, 128)
        assert made["rope_theta"] == 5e5
        assert made["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


def test_same_seed_and_inputs_give_the_same_bytes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for name in ("a", "b"):
        assert quantize("--model", source.folder, "--output", tmp_path / name).exit_code == 0
    assert quantize("--model", source.folder, "--output", tmp_path / "c", "--seed", "1").exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        ("llama", {"prefix": "model.", "dtype": "bfloat16", "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"shards": 3, "dtype": "float32"}),
    ],
)
def test_other_families_biases_dtypes_and_shards(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    source = make_checkpoint(family, **options)
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fidelity"]["mean_cosine"] > 0.9
    made = find(str(tmp_path / "out"))
    assert made.prefix == source.prefix
    biases = {name for name in source.files if name.endswith(".bias")}
    assert biases <= set(made.files)


def test_large_checkpoints_are_written_in_shards(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    monkeypatch.setattr(parts, "SHARD_BYTES", 150_000)
    assert quantize("--model", source.folder, "--output", tmp_path / "out").exit_code == 0
    made = find(str(tmp_path / "out"))
    assert len(set(made.files.values())) > 1
    assert len([name for name in made.files if name.endswith(".qweight")]) == 14


def test_an_existing_target_is_refused_and_left_as_it_was(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("precious")
    assert_refused(quantize("--model", source.folder, "--output", target), "exists already", "--force")
    assert_refused(quantize("--model", source.folder, "--output", target, "--force"), "not made by qembed")
    assert contents(target).keys() == {"notes.txt"}
    assert_refused(quantize("--model", source.folder, "--output", source.folder, "--force"), "source")


def test_force_replaces_only_when_the_new_one_is_whole(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    before = contents(target)
    with monkeypatch.context() as patched:
        patched.setattr(stream.LayerQuantizer, "run", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        result = quantize("--model", source.folder, "--output", target, "--force")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert contents(target) == before
    assert not list(tmp_path.glob(".*"))
    assert quantize("--model", source.folder, "--output", target, "--force", "--seed", "5").exit_code == 0
    assert contents(target) != before
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_a_killed_run_are_cleared_and_a_running_one_is_not_disturbed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    import fcntl

    source, target = make_checkpoint(), tmp_path / "out"
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "part-layer-999.safetensors").write_bytes(b"left by a killed run")
    with (left / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(quantize("--model", source.folder, "--output", target), "another qembed quantize")
        assert (left / "part-layer-999.safetensors").exists()
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    assert not left.exists()
    assert {path.name for path in target.glob("*.safetensors")} == {"model.safetensors"}


def test_a_run_killed_between_the_two_renames_is_healed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    before = contents(target)
    target.rename(tmp_path / ".out.replaced")
    assert_refused(quantize("--model", source.folder, "--output", target), "exists already")
    assert contents(target) == before


def test_what_cannot_be_quantized_is_refused_and_nothing_written(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    config = json.loads((source.folder / "config.json").read_text())

    def refused(change: dict[str, Any], *words: str) -> None:
        (source.folder / "config.json").write_text(json.dumps({**config, **change}))
        assert_refused(quantize("--model", source.folder, "--output", target), *words)
        assert not target.exists()

    refused({"model_type": "qwen3_moe"}, "qwen3_moe", "not supported")
    refused({"quantization_config": {"quant_method": "gptq"}}, "already quantized", "gptq")
    refused({"intermediate_size": 288}, "288", "64")
    refused({"intermediate_size": 320}, "[256, 128]")
    refused({"num_hidden_layers": 3}, "layers.2.", "missing")
    refused({"vocab_size": 200}, "embed_tokens.weight")
    (source.folder / "config.json").write_text("{")
    assert_refused(quantize("--model", source.folder, "--output", target), "config.json", "not JSON")


def test_damaged_tensors_are_refused_by_name(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    name = "layers.1.mlp.up_proj.weight"
    weight = source.tensor(name)
    broken = weight.clone()
    broken[3, 4] = float("nan")
    rewrite(source, {name: broken})
    assert_refused(quantize("--model", source.folder, "--output", target), name, "NaN")
    rewrite(source, {name: None})
    assert_refused(quantize("--model", source.folder, "--output", target), name, "missing")
    rewrite(source, {name: weight})
    path = source.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(quantize("--model", source.folder, "--output", target), "model.safetensors", "damaged")
    path.unlink()
    assert_refused(quantize("--model", source.folder, "--output", target), "no model.safetensors")
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_missing_shard_and_an_index_that_points_outside(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("qwen3", shards=2)
    index = source.folder / "model.safetensors.index.json"
    (source.folder / "model-1.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "model-1.safetensors", "missing")
    index.write_text(index.read_text().replace("model-1.safetensors", "../elsewhere.safetensors"))
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "outside the folder")


def test_a_tokenizer_that_disagrees_with_the_vocabulary(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(vocab_size=200)
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "256", "200")


@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.R_OK), reason="needs /proc, which nobody can write to")
def test_a_target_that_cannot_be_written(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert_refused(quantize("--model", source.folder, "--output", "/proc/out"), "/proc", "cannot be written")
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "no" / "such"), "no such folder")


def test_a_device_that_is_not_there(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for device in ("cuda:99", "mps", "nonsense"):
        result = quantize("--model", source.folder, "--output", tmp_path / "out", "--device", device)
        assert_refused(result, f"--device {device}")


def test_threads_are_those_asked_for(make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--threads", "3", "--device", "cpu").exit_code == 0
    assert asked == [3]


@pytest.mark.parametrize(("name", "meaning"), [("gptq", "gptq"), ("rtn", "rtn"), ("compensated", "gptq"), ("nearest", "rtn")])
def test_rounding_is_named_as_the_field_does_and_by_its_old_names(name: str, meaning: str) -> None:
    assert Rounding(["gptq", "rtn"]).convert(name, None, None) == meaning
