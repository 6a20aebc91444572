"""A reranker's launch: what vLLM and the gate get, and the settings that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.text.prompts import DEFAULT_INSTRUCTION
from qembed.vllm.arguments import arguments, rules
from qembed.vllm.devices import Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.plan import CPU_RUNTIME, GATE_TOKENIZER, TOKENIZER
from qembed.vllm.settings import Launch, ServerSettings, resolve
from tests.checkpoints import RERANKER_CONTEXT

CPU = Target("cpu", "CPU", 2**34, 2**34)


def launched(checkpoint: Checkpoint, **settings: Any) -> Launch:
    return resolve(ServerSettings(checkpoint, **settings), CPU, Cpu(), 1)


def value_of(launch: Launch, option: str) -> str:
    words = arguments(launch)
    return words[words.index(option) + 1]


def test_vllm_gets_what_the_published_form_needs(reranker: Path, converted_reranker: Path) -> None:
    original, converted = (launched(find(str(folder))) for folder in (reranker, converted_reranker))
    overrides = json.loads(value_of(original, "--hf-overrides"))
    assert overrides["architectures"] == ["Qwen3ForSequenceClassification"]
    assert (overrides["classifier_from_token"], overrides["is_original_qwen3_reranker"]) == (["no", "yes"], True)
    assert "classifier_from_token" not in json.loads(value_of(converted, "--hf-overrides"))
    for launch in (original, converted):
        assert value_of(launch, "--convert") == "classify"
        assert value_of(launch, "--max-model-len") == str(RERANKER_CONTEXT)
        assert json.loads(value_of(launch, "--pooler-config")) == {"seq_pooling_type": "LAST", "use_activation": True}


def test_the_gate_gets_the_instruction_and_an_embedders_gate_none(reranker: Path, checkpoint: Checkpoint) -> None:
    assert rules(launched(find(str(reranker))), "token", 0).instruction == DEFAULT_INSTRUCTION
    assert rules(launched(find(str(reranker)), instruction="judge"), "token", 0).instruction == "judge"
    assert rules(launched(checkpoint), "token", 0).instruction is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"default_prompt": "query"}, "--default-prompt is for embedders"),
        ({"normalize": True}, "--normalize is for embedders"),
        ({"allow_token_ids": True}, "--allow-token-ids is for embedders"),
        ({"engine": "sglang"}, "--engine sglang is for embedders"),
        ({"instruction": " "}, "--instruction is empty"),
    ],
)
def test_settings_that_are_not_a_rerankers_are_refused(reranker: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        launched(find(str(reranker)), **settings)


def test_a_reranker_has_no_names_with_a_prompt(reranker: Path) -> None:
    launch = launched(find(str(reranker)), served_model_name="m")
    words = arguments(launch)
    start = words.index("--served-model-name")
    assert words[start + 1 : start + 3] == ["m", "--host"]
    assert rules(launch, "token", 0).prompt_models == {}


def test_an_embedder_has_no_instruction(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--instruction is for a reranker"):
        launched(checkpoint, instruction="judge")


def test_the_users_word_decides_what_is_launched(reranker: Path) -> None:
    as_embedder = launched(replace(find(str(reranker)), task="embed"))
    assert value_of(as_embedder, "--convert") == "embed"


def test_the_plan_counts_the_gates_tokenizer_of_a_reranker(reranker: Path) -> None:
    checkpoint = find(str(reranker))
    as_reranker, as_embedder = launched(checkpoint), launched(replace(checkpoint, task="embed"))
    rows = checkpoint.config["vocab_size"]
    assert as_reranker.plan.runtime - as_embedder.plan.runtime == GATE_TOKENIZER * rows > 0
    in_process = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1, served=False)  # has no gate
    assert in_process.plan.runtime == CPU_RUNTIME["caller"] + TOKENIZER * rows
