"""Tokens of a tokenizer without a row in the model's token table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.sample import FOLDER
from tests.checkpoints import write_checkpoint

ROWS = 13824
POISON = (Path(__file__).parents[1] / "cases" / "03-token-beyond-vocab" / "poison.txt").read_text().splitlines()


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Checkpoint]:
    """The sample with a file changed by a function of its content."""

    def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Checkpoint:
        folder = tmp_path / "sample"
        folder.mkdir()
        for file in FOLDER.iterdir():
            if file.is_file():
                shutil.copy(file, folder / file.name)
            else:
                shutil.copytree(file, folder / file.name)
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content))
        return find(str(folder))

    return change


def added(id_: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id_, "content": "[CUST]", **flags}


def test_every_token_of_the_sample_has_a_row() -> None:
    vocabulary = find("sample").vocabulary()
    assert (vocabulary.rows, dict(vocabulary.beyond), vocabulary.warning()) == (ROWS, {}, None)
    assert vocabulary.token_beyond("[CUST]") is None


@pytest.mark.parametrize("id_", [ROWS, ROWS + 500])
def test_a_token_added_to_the_tokenizer_alone_is_named(changed: Callable[..., Checkpoint], id_: int) -> None:
    checkpoint = changed("tokenizer.json", lambda content: content["added_tokens"].append(added(id_)))
    vocabulary = checkpoint.vocabulary()
    assert list(vocabulary.beyond) == ["[CUST]"]
    assert "'[CUST]'" in str(checkpoint.vocabulary_warning)
    assert str(ROWS) in str(checkpoint.vocabulary_warning)
    tokens = [vocabulary.token_beyond(line) for line in POISON]
    assert "[CUST]" in tokens
    assert all((token is not None) == ("[CUST]" in line) for token, line in zip(tokens, POISON, strict=True))


@pytest.mark.parametrize(
    "entry",
    [
        {"added_tokens_decoder": {str(ROWS): added(ROWS)}},
        {"pad_token": "[CUST]"},
        {"mask_token": {"content": "[CUST]"}},
        {"additional_special_tokens": ["[CUST]"]},
        {"extra_special_tokens": {"custom": "[CUST]"}},
    ],
)
def test_a_token_that_only_tokenizer_config_adds_is_named(changed: Callable[..., Checkpoint], entry: dict[str, Any]) -> None:
    vocabulary = changed("tokenizer_config.json", lambda content: content.update(entry)).vocabulary()
    assert "[CUST]" in vocabulary.beyond
    assert vocabulary.token_beyond("hello [CUST] there") == "[CUST]"


def test_a_token_appended_to_every_text_is_refused_at_once(changed: Callable[..., Checkpoint]) -> None:
    def append(content: dict[str, Any]) -> None:
        text = json.dumps(content["post_processor"]).replace("13821", str(ROWS))
        content["added_tokens"].append(added(ROWS))
        content["post_processor"] = json.loads(text)

    with pytest.raises(BadInput, match="every text"):
        changed("tokenizer.json", append).vocabulary()


def test_the_rows_of_an_int8_table_are_those_of_its_integers(tmp_path: Path) -> None:
    """Such a checkpoint has an empty float table, too."""
    tensors = {"embed_tokens.weight": np.zeros(0, np.float16), "embed_tokens.qweight": np.zeros((10, 64), np.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint("int8", tmp_path).table_rows() == 10


def test_a_tokenizer_that_cuts_texts_at_their_start_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "qwen3", architectures=["Qwen3ForCausalLM"])
    path = checkpoint.folder / "tokenizer.json"
    for direction in ("Right", "Left"):
        truncation = {"direction": direction, "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": truncation}))
        if direction == "Right":
            assert len(checkpoint.tokenizer().encode("x" * 20).ids) == 21
        else:
            with pytest.raises(BadInput, match="left"):
                checkpoint.tokenizer()
