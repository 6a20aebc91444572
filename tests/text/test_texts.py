"""All five commands give the model the same input for a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qembed.checkpoint.description import Checkpoint
from qembed.embed import windows
from qembed.embed.rows import Row
from qembed.errors import BadInput
from qembed.eval.evaluation import Reader
from qembed.quantize import calibration
from qembed.quantize.calibration_texts import Texts
from qembed.search import query
from qembed.serve.gate import request
from qembed.text.prompts import instruct
from qembed.text.texts import Text
from qembed.vectors import sources
from qembed.vllm.gate_rules import Rules
from tests.embedders import write_embedder

PROMPTS = {"query": "Q: ", "document": "D: "}
TASK = "Find cafe\u0301s\u200b"
UNCLEAN, CLEAN = "A cafe\u0301\u200b \u0000menu", "A caf\u00e9 menu"
CASES = [
    (Text("document", UNCLEAN, "document"), CLEAN),
    (Text("code", UNCLEAN, "code"), CLEAN),
    (Text("query", UNCLEAN, "query"), "Q: " + CLEAN),
    (Text("instruction", UNCLEAN, "query", instruction=TASK), instruct("Find caf\u00e9s") + CLEAN),
]


class Recorder:
    """A tokenizer that records its inputs."""

    def __init__(self) -> None:
        self.inputs: list[str] = []

    def encode(self, text: str) -> Any:
        self.inputs.append(text)
        return SimpleNamespace(ids=[1])

    def enable_truncation(self, _: int) -> None:
        pass


def read_by_quantize(text: Text, _: pytest.MonkeyPatch) -> str:
    recorder = Recorder()
    trunk = SimpleNamespace(document_prompt="", context=9)
    checkpoint = SimpleNamespace(
        prompts=PROMPTS,
        trunk=trunk,
        tokenizer=lambda: recorder,
        config={"vocab_size": 9},
        folder=Path("tiny"),
        name="tiny",
    )
    calibration.prepare(Texts([text], "file", "0"), checkpoint, max_tokens=9, check=0, seed=0)  # type: ignore[arg-type]
    return recorder.inputs[-1]


def read_by_serve(text: Text, _: pytest.MonkeyPatch) -> str:
    body: dict[str, Any] = {"input": text.text}
    if text.kind == "query":
        body |= {"prompt_name": "query"} if text.instruction is None else {"instruction": text.instruction}
    rules = Rules(folder="", max_model_len=99, dimensions=[], prompts=PROMPTS)
    (whole,) = request.read(json.dumps(body).encode(), rules, len).inputs
    return str(whole)


def read_by_embed(text: Text, _: pytest.MonkeyPatch) -> str:
    from qembed.embed import job_options

    options = {"prompt": "query" if text.kind == "query" else None, "instruction": text.instruction, "clean": True}
    checkpoint = SimpleNamespace(prompts=PROMPTS, embedder=SimpleNamespace(document_prompt=""))
    computing: Any = SimpleNamespace(checkpoint=checkpoint, model="tiny")
    prompt = job_options._prompt(options, computing)
    rows = iter([Row("line 1", text.id, text.text)])
    (window,) = windows.windows(rows, windows.Texts(prompt=prompt), windows.Position(), 0)
    return window.items[0].text


def read_by_eval(text: Text, _: pytest.MonkeyPatch) -> str:
    (whole,), _lengths = Reader(PROMPTS, None).inputs([text], None)
    return whole


def read_by_search(text: Text, monkeypatch: pytest.MonkeyPatch) -> str:
    received: list[str] = []

    def embed(texts: Sequence[str], _: object) -> np.ndarray:
        received.extend(texts)
        return np.ones((len(texts), 4), np.float32)

    source = sources.Source("transformers", "tiny", None, None, None, None, None, embed)
    side = sources.Side(None, lambda _: nullcontext(source))
    known = SimpleNamespace(name="tiny", prompts=PROMPTS)
    monkeypatch.setattr(query, "find", lambda _: known)
    monkeypatch.setattr(sources, "transformers", lambda _: side)
    store = SimpleNamespace(path=Path("i.faiss"), model="tiny", dimensions=4, source={})
    settings = query.QuestionSettings(instruction=text.instruction)
    with query.opened(store, settings, Console(quiet=True)) as embed:  # type: ignore[arg-type]
        embed([text.text])
    return received[0]


COMMANDS = (read_by_quantize, read_by_serve, read_by_embed, read_by_eval, read_by_search)


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        pytest.param(read, *case, id=f"{read.__name__.removeprefix('read_by_')} {case[0].id}")
        for read in COMMANDS
        for case in CASES
        if read is not read_by_search or case[0].kind == "query"  # search embeds only queries
    ],
)
def test_every_command_gives_the_model_the_same_text(
    read: Callable[[Text, pytest.MonkeyPatch], str], text: Text, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(text, monkeypatch) == expected


@pytest.mark.parametrize("read", [read_by_quantize, read_by_eval], ids=["quantize", "eval"])
def test_a_text_of_invisible_characters_is_refused_by_name(
    read: Callable[[Text, pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="line 7: the text is empty once"):
        read(Text("line 7", "\u200b\u2060"), monkeypatch)


def test_a_qwen3_embedding_without_prompts_has_its_own(tmp_path: Path) -> None:
    for name, prompted in (("Qwen3-Embedding-0.6B", True), ("tiny", False)):
        text = Text("1", "cats", "query").model_input(Checkpoint(name, tmp_path).prompts)
        assert text.startswith("Instruct: ") is prompted
        assert text.endswith("cats")


def test_embed_puts_the_models_default_prompt_before_texts_without_one(tmp_path: Path) -> None:
    from qembed.embed import job_options

    checkpoint = write_embedder(tmp_path / "model", prompts={"prompts": {"passage": "P: "}, "default_prompt_name": "passage"})
    options = {"prompt": None, "instruction": None, "clean": True}
    computing: Any = SimpleNamespace(checkpoint=checkpoint, model="model")
    assert job_options._prompt(options, computing) == "P: "
    assert job_options._prompt({**options, "prompt": ""}, computing) == ""
    assert job_options._prompt(options, SimpleNamespace(checkpoint=None, model="model")) == ""  # type: ignore[arg-type]
