"""A checkpoint is not trusted: only its own regular files are read, and the numbers of its config are checked."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint import files
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.sample import FOLDER
from qembed.vllm.devices import Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import ServerSettings, resolve

READ = [
    "LICENSE-MIT",
    "tokenizer.extra",
    "tokenizer_config.json",
    "README.md",
    "model.safetensors",
    "extra.bin",
    "9_x/config.json",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the sample."""
    copy = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    shutil.copytree(FOLDER, copy)
    return copy


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("{}")
    return path


def put(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", READ)
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, secret: Path, name: str) -> None:
    put(folder, name, lambda path: path.symlink_to(secret))
    with pytest.raises(BadInput, match=f"{name}.*leads out of its folder"):
        find(str(folder))


def test_a_linked_subfolder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (folder / "9_x").symlink_to(tmp_path / "other")
    with pytest.raises(BadInput, match="leads out of its folder"):
        find(str(folder))


@pytest.mark.parametrize(
    "name", ["NOTICE", "tokenizer_x", "tokenizer_config.json", "model.safetensors", "1_Pooling/config.json"]
)
def test_only_regular_files_are_opened(folder: Path, tmp_path: Path, name: str) -> None:
    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
        (tmp_path / "s").rename(path)

    for make in (
        os.mkfifo,
        Path.mkdir,
        listening,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("no"),
    ):
        put(folder, name, make)
        with pytest.raises(BadInput, match=f"{name}.*cannot be read"):
            find(str(folder))
        (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)


def test_a_snapshot_of_the_hub_is_a_folder_of_links(folder: Path) -> None:
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    checkpoint = find(str(folder))
    assert checkpoint.config["model_type"] == "qwen3"
    assert checkpoint.tensor("norm.weight").shape == (256,)
    assert checkpoint.vocabulary().beyond == {}


def test_a_folder_of_links_into_the_hubs_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = tmp_path / "hub" / "models--c--d" / "blobs" / "1"
    other = tmp_path / "blobs" / "1"
    for path in (blob, other):
        path.parent.mkdir(parents=True)
        path.write_text("MIT")
    put(folder, "LICENSE-MIT", lambda path: path.symlink_to(blob))
    find(str(folder))
    put(folder, "LICENSE-MIT", lambda path: path.symlink_to(other))
    with pytest.raises(BadInput, match="leads out"):
        find(str(folder))


def test_a_link_within_the_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    shutil.move(folder / "config.json", folder / "data" / "config.json")
    (folder / "config.json").symlink_to("data/config.json")
    assert find(str(folder)).config["model_type"] == "qwen3"


@pytest.mark.parametrize(("name", "limit"), [("config.json", files.LARGEST_JSON), ("tokenizer.json", files.LARGEST_FILE)])
def test_files_without_tensors_have_a_largest_size(folder: Path, name: str, limit: int) -> None:
    os.truncate(folder / name, limit + 1)
    with pytest.raises(BadInput, match=f"{limit:,}"):
        find(str(folder))
    with pytest.raises(BadInput, match=f"{limit:,}"):
        Checkpoint("x", folder).tokenizer() if name == "tokenizer.json" else Checkpoint("x", folder).config


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_hidden_layers": 10**9},
        {"head_dim": 10**9},
        {"max_position_embeddings": 10**400},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e300}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6, "long_factor": [1.0, float("inf")]}},
        {"vocab_size": -(10**12)},
        {"rope_theta": float("nan")},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 1e300}}},
        {"rope_scaling": {"rope_type": "yarn", "factor": "1e300"}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [[1.0, "inf"]]}},
        {"num_hidden_layers": "4"},
    ],
)
def test_impossible_numbers_are_refused(folder: Path, numbers: dict[str, Any]) -> None:
    change(folder, "config.json", lambda config: config.update(numbers))
    with pytest.raises(BadInput, match=next(iter(numbers))):
        _ = find(str(folder)).config


def test_numbers_within_sections_are_checked_too(folder: Path) -> None:
    change(folder, "config.json", lambda config: config.update(text_config={"decoder": [{"num_hidden_layers": 10**9}]}))
    with pytest.raises(BadInput, match="num_hidden_layers"):
        _ = find(str(folder)).config
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_theta": 5e6, "factor": 4.0},
    }
    change(folder, "config.json", lambda config: config.update(text_config=None, rope_parameters=rope))
    assert find(str(folder)).config["rope_parameters"] == rope


@pytest.mark.parametrize(("prompt", "words"), [("x" * 100_000, "100,000 characters"), ("\ud800", "surrogate")])
def test_unusable_prompts_are_refused(folder: Path, prompt: str, words: str) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": prompt}}))
    with pytest.raises(BadInput, match=words):
        _ = find(str(folder)).prompts


def test_a_normalizer_that_grows_texts_is_refused(folder: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    grow = {"type": "Sequence", "normalizers": [step] * 3}
    change(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=grow))
    with pytest.raises(BadInput, match="normalizer"):
        find(str(folder)).tokenizer()


def test_a_tokenizer_whose_regular_expression_fails(folder: Path) -> None:
    from qembed.checkpoint.vocabulary import token_ids

    split = {"type": "Split", "pattern": {"Regex": "(a+)+$|(\\w+\\s?)+!"}, "behavior": "Isolated", "invert": False}
    change(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=split))
    tokenizer = find(str(folder)).tokenizer()
    with pytest.raises(BadInput, match="the tokenizer fails") as error:
        token_ids(tokenizer, "word and " * 20_000, "folder")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_multiplies_texts_is_refused(folder: Path) -> None:
    template = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000, "pair": [],
        "special_tokens": {},
    }  # fmt: skip
    change(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=template))
    with pytest.raises(BadInput, match="makes 10,000 tokens of a single letter"):
        find(str(folder)).tokenizer()


@pytest.mark.parametrize("layers", [4096, 5, 7])
def test_a_config_with_another_number_of_layers_than_the_tensors_is_refused_before_a_model_is_built(
    folder: Path, layers: int
) -> None:
    change(folder, "config.json", lambda config: config.update(num_hidden_layers=layers))
    with pytest.raises(BadInput, match=f"config.json has {layers} layers, the safetensors files 6"):
        resolve(ServerSettings(find(str(folder))), Target("cpu", "CPU"), Cpu(), 1)
