"""Which checkpoints are rerankers, by config, modules, chat template, name or the user's word, and which are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint.find import find
from qembed.checkpoint.reranker import LONGEST, SYSTEM, Reranker
from qembed.errors import BadInput
from tests.checkpoints import RERANKER_CONTEXT

LOGIT_SCORE = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_LogitScore",
        "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    },
]


@pytest.fixture
def unnamed(reranker: Path, tmp_path: Path) -> Path:
    """A reranker whose name and files do not say that it is one."""
    return Path(shutil.copytree(reranker, tmp_path / "model"))


@pytest.fixture
def classifier(converted_reranker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted_reranker, tmp_path / "classifier"))


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def described(folder: Path) -> Reranker | None:
    return find(str(folder)).reranker


def test_a_causal_language_model_is_a_reranker_by_its_name(reranker: Path, unnamed: Path) -> None:
    description = described(reranker)
    assert description is not None
    assert (description.form, description.trunk.context) == ("original", RERANKER_CONTEXT)
    tokenizer = find(str(reranker)).tokenizer()
    assert [tokenizer.id_to_token(id_) for id_ in description.answers] == ["no", "yes"]
    assert description.overrides["classifier_from_token"] == ["no", "yes"]
    assert described(unnamed) is None


def test_a_quantized_reranker_is_one_by_the_name_of_its_source(unnamed: Path) -> None:
    (unnamed / "qembed.json").write_text(json.dumps({"source": {"model": "Qwen/Qwen3-Reranker-0.6B"}}))
    assert described(unnamed) is not None


def test_a_chat_template_of_a_reranker_makes_one(unnamed: Path) -> None:
    change(unnamed, "tokenizer_config.json", chat_template="{{ messages }}")
    assert described(unnamed) is None
    change(unnamed, "tokenizer_config.json", chat_template=f"<|im_start|>system\n{SYSTEM}")
    assert described(unnamed) is not None
    change(unnamed, "tokenizer_config.json", chat_template=None)
    (unnamed / "chat_template.jinja").write_text(f"<|im_start|>system\n{SYSTEM}")
    assert described(unnamed) is not None


def test_the_user_says_what_a_checkpoint_is_for(unnamed: Path, reranker: Path) -> None:
    assert replace(find(str(unnamed)), task="rerank").reranker is not None
    assert replace(find(str(reranker)), task="embed").reranker is None


def test_sentence_transformers_module_of_two_logits_makes_a_reranker(unnamed: Path) -> None:
    tokenizer = find(str(unnamed)).tokenizer()
    no, yes = (tokenizer.token_to_id(word) for word in ("no", "yes"))
    (unnamed / "modules.json").write_text(json.dumps(LOGIT_SCORE))
    (unnamed / "1_LogitScore").mkdir()
    config = unnamed / "1_LogitScore" / "config.json"
    config.write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    assert described(unnamed) is not None
    config.write_text(json.dumps({"true_token_id": yes, "false_token_id": None}))
    with pytest.raises(BadInput, match="false_token_id and true_token_id are"):
        described(unnamed)
    config.write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    (unnamed / "chat_template.jinja").write_text("<|im_start|>system\nRate the document.")
    with pytest.raises(BadInput, match="chat template"):
        described(unnamed)


def test_a_classifier_with_one_label_is_a_reranker(classifier: Path) -> None:
    description = described(classifier)
    assert description is not None
    assert (description.form, description.overrides) == ("converted", {})
    change(classifier, id2label={"0": "no", "1": "yes"})
    with pytest.raises(BadInput, match="one label"):
        described(classifier)


def test_a_classifier_without_its_row_is_refused(classifier: Path) -> None:
    change(classifier, hidden_size=64)
    with pytest.raises(BadInput, match=r"score.weight has shape \[1, 128\], not \[1, 64\]"):
        described(classifier)


def test_a_prompt_is_no_longer_than_on_the_model_card(unnamed: Path) -> None:
    change(unnamed, max_position_embeddings=40960)
    description = replace(find(str(unnamed)), task="rerank").reranker
    assert description is not None
    assert (description.trunk.context, description.trunk.positions) == (LONGEST, 40960)


def test_an_embedder_is_no_reranker(fp16: Path) -> None:
    assert described(fp16) is None
    assert find("sample").reranker is None
