"""`qembed quantize` from the command line: its output, and the input that it refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find, source_of
from qembed.cli import group
from qembed.command import progress
from qembed.quantize import layerwise, parts
from qembed.quantize.model_card import SHARE_OF_AWQ_ERROR
from tests.checkpoints import MakeCheckpoint, write_modules

from .conftest import assert_refused, contents, quantize

pytestmark = pytest.mark.slow


def change_tensors(checkpoint: Checkpoint, change: dict[str, torch.Tensor | None]) -> None:
    path = checkpoint.folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_output_folder_is_complete_and_describes_itself(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    write_modules(source.folder)
    target = tmp_path / "out"
    result = quantize("--model", source.folder, "--output", target, "--json")
    assert result.exit_code == 0, result.output
    checkpoint = find(str(target))
    assert checkpoint.is_int4
    assert checkpoint.config["quantization_config"] | {"modules_to_not_convert": None} == {
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
    assert find(source_of(checkpoint)).folder == source.folder
    for name, digest in checkpoint.manifest["files"].items():
        assert contents(target)[name] == digest
    assert checkpoint.manifest["source"]["sha256"]["model.safetensors"] == contents(source.folder)["model.safetensors"]
    assert checkpoint.manifest["calibration"]["tokens"] > 1000
    fidelity = json.loads(result.stdout)["fidelity"]
    card = (target / "README.md").read_text()
    assert f"{fidelity['mean_cosine']:.4f}" in card
    results = (Path(__file__).parents[2] / "bench" / "RESULTS.md").read_text()
    row = next(
        line for line in results.split("Quality of INT4: a language model")[1].splitlines() if line.startswith("| **qembed**")
    )
    assert [f"({share})" in row and share in card for share in SHARE_OF_AWQ_ERROR.values()] == [True] * 3
    assert not list(tmp_path.glob(".*"))
    dtypes = {dtype for name, (_, dtype) in checkpoint.shapes().items() if "proj" not in name}
    assert dtypes == {"F16"}


def test_progress_names_the_stage_that_runs(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.LineReporter, "repeating", lambda _: nullcontext())
    result = quantize("--model", make_checkpoint().folder, "--output", tmp_path / "out")
    stages = [line.rpartition(", ")[0] for line in result.stderr.splitlines() if line.endswith(" s") and " of " in line]
    assert stages[-4:] == [
        "checking tensors: 100%, 24 of 24",
        "layers: 0%, 0 of 2",
        "layers: 50%, 1 of 2",
        "layers: 100%, 2 of 2",
    ]


def test_output_is_reproducible_byte_for_byte(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
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
def test_families_biases_dtypes_and_shards(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    source = make_checkpoint(family, **options)
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fidelity"]["mean_cosine"] > 0.9
    checkpoint = find(str(tmp_path / "out"))
    assert checkpoint.prefix == source.prefix
    biases = {name for name in source.files if name.endswith(".bias")}
    assert biases <= set(checkpoint.files)


def test_large_checkpoints_are_written_in_shards(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    monkeypatch.setattr(parts, "SHARD_BYTES", 150_000)
    assert quantize("--model", source.folder, "--output", tmp_path / "out").exit_code == 0
    checkpoint = find(str(tmp_path / "out"))
    assert len(set(checkpoint.files.values())) > 1
    assert len([name for name in checkpoint.files if name.endswith(".qweight")]) == 14


def test_unsupported_checkpoints_are_refused_and_nothing_is_written(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
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


def test_errors_name_the_damaged_tensor(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    name = "layers.1.mlp.up_proj.weight"
    weight = source.tensor(name)
    broken = weight.clone()
    broken[3, 4] = float("nan")
    change_tensors(source, {name: broken})
    assert_refused(quantize("--model", source.folder, "--output", target), name, "NaN")
    change_tensors(source, {name: None})
    assert_refused(quantize("--model", source.folder, "--output", target), name, "missing")
    change_tensors(source, {name: weight})
    path = source.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(quantize("--model", source.folder, "--output", target), "model.safetensors", "damaged")
    path.unlink()
    assert_refused(quantize("--model", source.folder, "--output", target), "no model.safetensors")
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_missing_shard_and_index_that_points_outside_the_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("qwen3", shards=2)
    index = source.folder / "model.safetensors.index.json"
    (source.folder / "model-1.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "model-1.safetensors", "missing")
    index.write_text(index.read_text().replace("model-1.safetensors", "../elsewhere.safetensors"))
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "outside the folder")


def test_tokenizer_ids_beyond_the_vocabulary_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(vocab_size=200)
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "out"), "256", "200")


def test_unknown_device(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    for device in ("cuda:99", "mps", "nonsense"):
        result = quantize("--model", source.folder, "--output", tmp_path / "out", "--device", device)
        assert_refused(result, f"--device {device}")


def test_threads_option_sets_torchs_threads(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--threads", "3", "--device", "cpu").exit_code == 0
    assert threads == [3]


def test_what_to_run_next_is_printed_and_fits_the_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    result = quantize("--model", source.folder, "-o", tmp_path / "my model")
    assert result.exit_code == 0, result.output
    commands = [shlex.split(line.removeprefix("next:")) for line in result.stdout.splitlines() if "qembed " in line]
    assert [words[:2] for words in commands] == [["qembed", "serve"], ["qembed", "eval"]]
    for words in commands:
        assert find(words[words.index("--model") + 1]).is_int4
        parameters = group.get_command(None, words[1]).make_context(words[1], words[2:]).params  # type: ignore
        assert parameters["model"] == str(tmp_path / "my model")


def test_text_column_is_file_and_column(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, texts = make_checkpoint(), tmp_path / "t.csv"
    texts.write_text("body,text\n" + "".join(f"a body {row},\n" for row in range(80)))
    by_name = quantize("--model", source.folder, "-o", tmp_path / "a", "--calibration", texts, "--text-column", "body")
    assert by_name.exit_code == 0, by_name.output
    assert quantize("--model", source.folder, "-o", tmp_path / "b", "--calibration", f"{texts}:body").exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    both = ("--calibration", f"{texts}:body", "--text-column", "body")
    assert_refused(quantize("--model", source.folder, "-o", tmp_path / "c", *both), "leave one out")
    assert_refused(quantize("--model", source.folder, "-o", tmp_path / "c", "--text-column", "body"), "--calibration FILE")
    moved = texts.rename(tmp_path / "a" / "t.csv")
    result = quantize("--model", source.folder, "-o", tmp_path / "a", "--force", "--calibration", f"{moved}:body")
    assert_refused(result, "calibration texts", "would be lost")
    assert moved.exists()


def test_a_folder_that_holds_the_source_is_not_replaced(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    (tmp_path / "qembed.json").write_text("{}")
    assert_refused(quantize("--model", source.folder, "-o", tmp_path, "--force"), "contains the input")
    assert source.folder.is_dir()


def test_progress_leaves_the_check_before_the_first_layer_begins(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int]] = []
    real = layerwise.quantize

    def first_layer(*arguments: Any, **options: Any) -> Any:
        steps.append(("quantize is called", 0))
        return real(*arguments, **options)

    @contextmanager
    def progress(*_: Any) -> Iterator[Any]:
        yield lambda stage, done, _: steps.append((stage, done))

    monkeypatch.setattr(layerwise, "quantize", first_layer)
    monkeypatch.setattr("qembed.quantize.cli._progress", progress)
    assert quantize("--model", make_checkpoint().folder, "-o", tmp_path / "out").exit_code == 0
    assert steps[steps.index(("quantize is called", 0)) - 1] == ("layers", 0)
