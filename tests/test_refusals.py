"""Folders that sentence-transformers reads and qembed does not: each command refuses them in one line, before any work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.errors import BadInput
from qembed.search import query
from tests.embedders import DENSE, WIDE, write_embedder, write_texts

Change = Callable[[Path], None]
SETTINGS, POOLING, TOKENIZER = "sentence_bert_config.json", "1_Pooling/config.json", "tokenizer_config.json"
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def setting(name: str, **values: Any) -> Change:
    """Set values of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= values
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def modules(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    """Change the list in modules.json in place."""

    def write(folder: Path) -> None:
        entries = json.loads((folder / "modules.json").read_text())
        change(entries)
        (folder / "modules.json").write_text(json.dumps(entries))

    return write


def appended(type_: str) -> Change:
    """Append a module."""
    return modules(lambda entries: entries.append({"idx": 9, "name": "9", "path": "9_Module", "type": type_}))


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


REFUSED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "Normalize before Dense": ({"dense": [DENSE]}, modules(list.reverse), "first module"),
    "Normalize, then Dense": ({"dense": [DENSE]}, modules(lambda m: m.append(m.pop(2))), "after Normalize"),
    "Dense before Pooling": ({"dense": [WIDE]}, modules(lambda m: m.insert(1, m.pop(2))), "one Pooling"),
    "no Pooling": ({}, modules(lambda m: m.pop(1)), "one Pooling"),
    "one Dense twice": ({"dense": [DENSE]}, modules(lambda m: m.insert(3, dict(m[2]))), "two modules have the name"),
    "unknown activation": ({"dense": [DENSE]}, setting("2_Dense/config.json", activation_function="torch.nn.Mish"), "Mish"),
    "no activation": ({"dense": [DENSE]}, setting("2_Dense/config.json", activation_function=None), "activation_function"),
    "residual Dense": ({"dense": [DENSE]}, setting("2_Dense/config.json", use_residual=True), "use_residual"),
    "Dense of token states": (
        {"dense": [DENSE]}, setting("2_Dense/config.json", module_input_name="token_embeddings"), "module_input_name",
    ),
    "Dense of another width": ({"dense": [DENSE]}, setting("2_Dense/config.json", in_features=64), "in_features is 64"),
    "Dense without weights": ({"dense": [DENSE]}, removed("2_Dense/model.safetensors"), "model.safetensors is missing"),
    "Dense without config": ({"dense": [DENSE]}, removed("2_Dense/config.json"), "2_Dense/config.json"),
    "no folder of Pooling": ({}, removed(POOLING), POOLING),
    "no modules.json": ({}, removed("modules.json"), "modules.json is missing"),
    "weighted mean": ({"new_form": True, "pooling": "weightedmean"}, setting(POOLING), "'weightedmean'"),
    "cls": ({"pooling": "cls"}, setting(POOLING), "'cls'"),
    "max": ({"pooling": "max", "new_form": True}, setting(POOLING), "'max'"),
    "two modes, old form": ({}, setting(POOLING, pooling_mode_mean_tokens=True), "mean, lasttoken"),
    "two modes, new form": ({"new_form": True}, setting(POOLING, pooling_mode=["mean", "max"]), "mean, max"),
    "a mode of later versions": ({}, setting(POOLING, pooling_mode_lasttoken=False, pooling_mode_new=True), "pooling_mode_new"),
    "pooling without the prompt": ({"pooling": "mean"}, setting(POOLING, include_prompt=False), "include_prompt"),
    "Normalize that does not": (
        {"normalize_config": {"normalize_embeddings": False}}, setting("2_Normalize/config.json"), "normalize_embeddings",
    ),
    "LayerNorm": ({}, appended("sentence_transformers.models.LayerNorm"), "LayerNorm"),
    "WeightedLayerPooling": ({}, appended("sentence_transformers.models.WeightedLayerPooling"), "WeightedLayerPooling"),
    "a module's own class": ({}, appended("custom.Normalize"), "custom.Normalize"),
    "vectors cut by default": ({}, setting("config_sentence_transformers.json", truncate_dim=32), "truncate_dim"),
    "a default prompt that is not there": (
        {}, setting("config_sentence_transformers.json", default_prompt_name="x"), "default_prompt_name",
    ),
    "a sparse encoder": ({}, setting("config_sentence_transformers.json", model_type="SparseEncoder"), "SparseEncoder"),
    "texts in a chat template": ({}, setting(SETTINGS, modality_config={"text": FORWARD, "message": FORWARD}), "message"),
    "another output": ({}, setting(SETTINGS, module_output_name="pooler_output"), "module_output_name"),
    "arguments for the tokenizer": ({}, setting(SETTINGS, processing_kwargs={"text": {"max_length": 9}}), "processing_kwargs"),
    "arguments for the config": ({}, setting(SETTINGS, config_kwargs={"is_causal": False}), "config_kwargs"),
    "texts cut at their start": ({}, setting(TOKENIZER, truncation_side="left"), "truncation_side"),
    "a token that is not added": ({}, setting(TOKENIZER, add_bos_token=True), "add_bos_token"),
    "code of the tokenizer": ({}, setting(TOKENIZER, auto_map={"AutoTokenizer": ["code.Tokenizer", None]}), "auto_map"),
    "code of the model": ({}, setting("config.json", auto_map={"AutoModel": "code.Model"}), "code of its own, 'Model'"),
    "a model of voyage without its layer": (
        {}, setting("config.json", auto_map={"AutoModel": "code.Qwen3BidirectionalModel"}), "linear.weight is missing",
    ),
    "another architecture": ({}, setting("config.json", architectures=["Qwen3ForTokenClassification"]), "architecture"),
    "bidirectional Mistral": ({"family": "mistral"}, setting("config.json", is_causal=False), "not for mistral"),
    "bidirectional window": (
        {}, setting("config.json", is_causal=False, layer_types=["full_attention", "sliding_attention"]), "sliding window",
    ),
    "attention by another name": ({}, setting("config.json", use_bidirectional_attention=True), "use_bidirectional_attention"),
    "rotary positions that depend on the batch": (
        {}, setting("config.json", rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope",
    ),
    "rotary positions that libraries compute differently": (
        {}, setting("config.json", rope_scaling={"type": "dynamic", "factor": 4.0}), "dynamic",
    ),
    "rotary positions for each kind of layer": (
        {}, setting("config.json", rope_parameters={"full_attention": {"rope_type": "default"}}), "each kind of layer",
    ),
    "a part of each head rotated": ({}, setting("config.json", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "an adapter beside the model": ({}, setting("adapter_config.json", peft_type="LORA"), "adapter_config.json"),
    "an index that leaves out model.safetensors": (
        {}, setting("model.safetensors.index.json", weight_map={"norm.weight": "other.safetensors"}), "remove one",
    ),
    "a list of sizes beyond the width": ({}, setting("config.json", matryoshka_dimensions=[32, 999]), "matryoshka_dimensions"),
}  # fmt: skip
"""Arguments of `write_embedder`, what is changed then, and a part of the message."""


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Command lines without the model, by name."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    return {
        "quantize": ["quantize", "-o", str(tmp_path / "out"), "--device", "cpu"],
        "serve": ["serve", "--fp16", "--port", "0"],
        "plan": ["serve", "--fp16", "--plan"],
        "embed": ["embed", str(texts), "-o", str(tmp_path / "out.npy"), "--fp16"],
    }


def assert_refused(command: list[str], message: str) -> None:
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 2, (command, result.output, result.exception)
    assert message in result.stderr, command
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_description_cannot_hold_is_refused_by_every_command(
    name: str, tmp_path: Path, commands: dict[str, list[str]]
) -> None:
    arguments, change, part = REFUSED[name]
    folder = tmp_path / "model"
    write_embedder(folder, **arguments)
    change(folder)
    with pytest.raises(BadInput) as refused:
        _ = Checkpoint("model", folder).embedder
    assert part in str(refused.value)
    assert str(folder) in str(refused.value)
    for command in commands.values():
        assert_refused([*command, "--model", str(folder)], str(refused.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "texts.jsonl"]


IN_INT4 = ["Normalize, then Dense", "two modes, old form", "Dense without weights", "texts in a chat template"]


@pytest.mark.slow
def test_the_same_in_an_int4_checkpoint(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    source, int4 = write_embedder(tmp_path / "model", dense=[DENSE]), tmp_path / "model-AWQ-INT4"
    quantize = [
        "quantize",
        "--model",
        str(source.folder),
        "-o",
        str(int4),
        "--calibration",
        str(write_texts(tmp_path / "c.jsonl")),
    ]
    result = CliRunner().invoke(group, [*quantize, "--group-size", "64", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    store: Any = SimpleNamespace(path=Path("i.faiss"), model=str(int4), dimensions=64, source={})
    for name in IN_INT4:
        folder = tmp_path / name
        shutil.copytree(int4, folder)
        REFUSED[name][1](folder)
        with pytest.raises(BadInput) as refused:
            _ = Checkpoint(name, folder).embedder
        message = str(refused.value)
        model = ["--model", str(folder)]
        assert_refused(["eval", "--baseline", "fp16", *model], message)
        assert_refused(["serve", "--int4", "--plan", *model], message)
        assert_refused(["embed", *commands["embed"][1:-1], "--int4", *model], message)
        verified = CliRunner().invoke(group, ["quantize", "--verify", str(folder), "--device", "cpu"])
        assert verified.exit_code == 1
        assert message in verified.output.replace("\n", " ")
        settings = query.QuestionSettings(model=str(folder), any_model=True)
        with pytest.raises(BadInput, match=re.escape(message)), query.opened(store, settings, Console(quiet=True)):
            pass
