"""The checkpoint that a name refers to, and the error if there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qembed.checkpoint import find
from qembed.errors import BadInput


def write(folder: Path, *, int4: bool = False, source: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", **({"quantization_config": {"quant_method": "awq", "bits": 4}} if int4 else {})}
    (folder / "config.json").write_text(json.dumps(config))
    if source:
        (folder / "qembed.json").write_text(json.dumps({"source": source}))
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_error_for_an_unavailable_model_is_one_line_and_suggests_alternatives() -> None:
    with pytest.raises(BadInput) as error:
        find.find("Qwen/Qwen3-Embedding-0.6B-not-in-any-cache")
    message = str(error.value)
    assert "\n" not in message
    assert "cannot be reached" in message
    assert "sample" in message
    assert "FOLDER" in message


@pytest.mark.parametrize("name", ["nonsense", "./no/such", "a/b/c", "/no/such/folder", "../x/y"])
def test_names_that_are_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        find.find(name)


def test_a_file_or_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="a file"):
        find.find("file")
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        find.find("empty")


def test_each_command_finds_the_output_of_the_previous_one() -> None:
    assert find.default_output(find.DEFAULT_MODEL) == Path("Qwen3-Embedding-0.6B-AWQ-INT4")
    assert find.default_output("sample") == Path("sample-AWQ-INT4")
    with pytest.raises(BadInput, match="run: qembed quantize"):
        find.find_int4(None)
    write(Path("sample-AWQ-INT4"), int4=True)
    assert find.find_int4(None).name == "sample-AWQ-INT4"
    assert find.find_int4("sample").name == "sample-AWQ-INT4"
    assert find.find_int4("sample-AWQ-INT4").name == "sample-AWQ-INT4"
    with pytest.raises(BadInput, match="qembed quantize --model acme/other"):
        find.find_int4("acme/other")
    write(Path("other-AWQ-INT4"), int4=True)
    with pytest.raises(BadInput, match="several"):
        find.find_int4(None)
    write(Path("Qwen3-Embedding-0.6B-AWQ-INT4"), int4=True)
    assert find.find_int4(None).name == "Qwen3-Embedding-0.6B-AWQ-INT4"


def test_a_source_folder_is_served_from_its_quantized_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "models" / "mine")
    write(Path("mine-AWQ-INT4"), int4=True)
    assert find.find_int4("models/mine").name == "mine-AWQ-INT4"
    assert find.find_int4(str(tmp_path / "models" / "mine" / ".." / "mine")).name == "mine-AWQ-INT4"


def test_a_folder_named_int4_without_int4_weights_is_refused() -> None:
    write(Path("sample-AWQ-INT4"))
    for model in ("sample", "sample-AWQ-INT4", "./sample-AWQ-INT4", None):  # None: the only such folder here
        with pytest.raises(BadInput, match="sample-AWQ-INT4: not an AWQ INT4"):
            find.find_int4(model)
    write(Path("other-AWQ-INT4"), int4=True)
    assert find.find_int4(None).name == "other-AWQ-INT4"


@pytest.mark.parametrize(
    "model", ["/missing/m-AWQ-INT4", "/missing/m", "~/missing/m", "./missing", "../m-AWQ-INT4", "a/b/c", "models/m-AWQ-INT4"]
)
def test_a_missing_folder_is_not_mistaken_for_a_source_model(model: str) -> None:
    with pytest.raises(BadInput) as caught:
        find.find_int4(model)
    assert str(caught.value).startswith(f"{model}: no such folder")
    assert "AWQ-INT4-AWQ-INT4" not in str(caught.value)


def test_a_checkpoint_with_an_int8_token_table_is_int4_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "made", int4=True)
    assert not find.find(str(folder)).has_int8_table
    quantization = {"quant_method": "qembed_awq", "bits": 4, "token_table": "int8"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert find.find_int4(str(folder)).has_int8_table


def test_the_source_of_an_int4_checkpoint(tmp_path: Path) -> None:
    near = write(tmp_path / "deep" / "source")
    checkpoint = find.find(str(write(tmp_path / "made", int4=True, source={"model": "source", "folder": "../deep/source"})))
    assert find.source_of(checkpoint) == str(near)
    hub = find.find(str(write(tmp_path / "hub", int4=True, source={"model": "Qwen/Qwen3-Embedding-0.6B"})))
    assert find.source_of(hub) == "Qwen/Qwen3-Embedding-0.6B"
    with pytest.raises(BadInput, match="--baseline-model"):
        find.source_of(find.find(str(write(tmp_path / "foreign", int4=True))))


def test_prompts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    assert find.find(str(folder)).prompts == {"query": "", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "find: "}}))
    assert find.find(str(folder)).prompts == {"query": "find: ", "document": ""}
    for nonsense in (["find: "], {"query": 5}):
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": nonsense}))
        with pytest.raises(BadInput, match="prompts are not texts"):
            _ = find.find(str(folder)).prompts
