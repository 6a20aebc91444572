"""Qwen3-Reranker's scores: through transformers, compared with a computation by hand, and through a vLLM server's two APIs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.cli import group
from qembed.errors import BadInput, QembedError
from tests.answering import answering
from tests.checkpoints import RERANKER_CONTEXT, write_int4
from tests.eval.conftest import FakeServer, cache_folder, start_server
from tests.eval.readers.test_beir import beir_folder

__all__ = ["cache_folder", "start_server"]

PAIRS = [("where do swifts sleep", text) for text in ("In the air.", "A stone. " * 12, "x")]
BODIES = [rerank.body(*pair) for pair in PAIRS]


def by_hand(folder: Path, body: str) -> float:
    """P(yes) of yes and no after the whole prompt, for a single text and from all logits."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = find(str(folder)).tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.encode(rerank.BEFORE + body + rerank.AFTER).ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    no, yes = (float(logits[tokenizer.token_to_id(word)]) for word in ("no", "yes"))
    return float(np.exp(yes) / (np.exp(yes) + np.exp(no)))


def test_scores_are_the_share_of_yes(reranker: Path) -> None:
    with rerank.through_transformers(find(str(reranker))).open() as score:
        scores = score(PAIRS, None)
    expected = [by_hand(reranker, body) for body in BODIES]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 1e-3


def test_a_converted_classifier_gives_the_same_scores(reranker: Path, converted_reranker: Path) -> None:
    with rerank.through_transformers(find(str(converted_reranker))).open() as score:
        scores = score(PAIRS, None)
    assert scores == pytest.approx([by_hand(reranker, body) for body in BODIES], abs=1e-5)


def test_an_output_head_of_its_own_has_the_rows_of_yes_and_no(reranker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reranker, tmp_path / "untied-reranker"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with rerank.through_transformers(find(str(folder))).open() as score:
        scores = score(PAIRS, None)
    assert scores == pytest.approx([by_hand(folder, body) for body in BODIES], abs=1e-5)
    assert scores != pytest.approx([by_hand(reranker, body) for body in BODIES], abs=1e-3)


def test_a_body_that_is_too_long_is_cut_and_the_question_stays(reranker: Path) -> None:
    with rerank.through_transformers(find(str(reranker))).open() as score:
        long, longer = score([("q", "a" * RERANKER_CONTEXT), ("q", "a" * RERANKER_CONTEXT + "b")], None)
    tokenizer = find(str(reranker)).tokenizer()
    room = RERANKER_CONTEXT - sum(
        len(tokenizer.encode(text).ids) for text in (rerank.BEFORE, rerank.body("q", ""), rerank.AFTER)
    )
    assert long == longer == pytest.approx(by_hand(reranker, rerank.body("q", "a" * room)), abs=1e-5)


def test_scores_are_cached(reranker: Path, tmp_path: Path) -> None:
    opened: list[int] = []
    tiny = rerank.through_transformers(find(str(reranker)))

    def open_once() -> Any:
        opened.append(1)
        return tiny.open()

    counted = rerank.Reranker(tiny.name, tiny.identity, open_once)
    for _ in range(2):
        score_pairs = rerank.scoring(counted, None, tmp_path, Console(quiet=True))
        scores = score_pairs(["q1", "q2"], ["a", "b"], [(0, 0), (1, 1), (0, 1)])
    assert opened == [1]
    assert scores == pytest.approx(
        [by_hand(reranker, rerank.body(*pair)) for pair in (("q1", "a"), ("q2", "b"), ("q1", "b"))], abs=1e-5
    )


def test_a_model_of_another_kind_is_refused(fp16: Path) -> None:
    with pytest.raises(BadInput, match="not a Qwen3-Reranker: its tokenizer has no single token for yes and for no"):
        rerank.through_transformers(find(str(fp16)))


@pytest.mark.parametrize("command", [["eval", "--engine", "transformers"], ["embed", "texts.txt", "--output", "out.npy"]])
def test_commands_for_vectors_refuse_a_reranker_in_one_line(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    write_int4(reranker, tmp_path / "int4-reranker")
    result = CliRunner().invoke(group, [*command, "--model", "int4-reranker"])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    assert "a reranker, which scores pairs" in line


def test_the_prompt_is_that_of_the_models_card() -> None:
    prompt = rerank.BEFORE + rerank.body("Q", "D", "I") + rerank.AFTER
    assert prompt == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: I\n<Query>: Q\n<Document>: D"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


class FakeVllm:
    """A vLLM with a reranker, as a classifier or generating; its score is the share of letters "a" in the document."""

    def __init__(self, *, classifies: bool) -> None:
        self.classifies, self.url = classifies, ""
        self.prompts: list[str] = []
        self.limit: int | None = None
        self.vocabulary = ("yes", "no")
        self.logprob_token_ids: list[int] | None = None

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            model = {"id": "r", "object": "model", "created": 0, "owned_by": "x", "max_model_len": self.limit}
            return 200, {"object": "list", "data": [model]}
        if path in ("/tokenize", "/detokenize") and not self.limit:
            return 404, {"error": {"message": "no such path", "code": 404}}
        if path == "/tokenize":
            return 200, {"tokens": {"no": [7], "yes": [8]}.get(body["prompt"], list(body["prompt"].encode()))}
        if path == "/detokenize":
            return 200, {"prompt": bytes(body["tokens"]).decode()}
        prompts = body.get("input") or body.get("prompt") or []
        scores = [self.score(prompt) for prompt in prompts]
        if path == "/classify" and self.classifies:
            self.prompts += prompts
            return 200, {"data": [{"index": row, "label": "0", "probs": [score]} for row, score in enumerate(scores)]}
        if path == "/v1/completions" and not self.classifies:
            self.prompts += prompts
            self.logprob_token_ids = body.get("logprob_token_ids")
            yes, no = self.vocabulary
            choices = [
                {"index": row, "text": yes, "finish_reason": "length",
                 "logprobs": {"top_logprobs": [{yes: float(np.log(score)), no: float(np.log(1 - score)), "maybe": -20.0}],
                              "tokens": [yes], "token_logprobs": [0.0], "text_offset": [0]}}
                for row, score in enumerate(scores)
            ]  # fmt: skip
            return 200, {"id": "1", "object": "text_completion", "created": 0, "model": "r", "choices": choices}
        return 404, {"error": {"message": "no such path", "code": 404}}

    @staticmethod
    def score(prompt: str) -> float:
        document = prompt.split("<Document>: ")[1].split("<|im_end|>")[0]
        return 0.01 + 0.98 * document.count("a") / max(len(document), 1)


class FakeQembed(FakeVllm):
    """A `qembed serve` with a reranker: it takes plain pairs, and has neither /classify nor completions."""

    def __init__(self) -> None:
        super().__init__(classifies=False)
        self.requests: list[dict[str, Any]] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/version":
            return 200, {"version": "0.32.0", "qembed": "0.1.0", "task": "rerank"}
        if path == "/v1/score":
            self.requests.append(body)
            scores = [{"index": row, "score": text.count("a") / 100} for row, text in enumerate(body["text_2"])]
            return 200, {"object": "list", "data": scores[::-1]}
        return super().answer(path, body) if path == "/v1/models" else (404, {"error": {"message": "no", "code": 404}})


@pytest.fixture
def start_vllm() -> Iterator[Callable[[FakeVllm], FakeVllm]]:
    with ExitStack() as running:

        def start(fake: FakeVllm) -> FakeVllm:
            fake.url = running.enter_context(answering(lambda request: fake.answer(request.path, request.body)))
            return fake

        yield start


@pytest.mark.parametrize("classifies", [True, False])
def test_a_server_gets_the_whole_prompt(start_vllm: Callable[[FakeVllm], FakeVllm], classifies: bool) -> None:
    fake = start_vllm(FakeVllm(classifies=classifies))
    with rerank.through_server(fake.url + "/v1").open() as score:
        scores = score(PAIRS, None)
    assert scores == pytest.approx([fake.score(f"{body}<|im_end|>") for body in BODIES], abs=1e-6)
    assert fake.prompts == [rerank.BEFORE + body + rerank.AFTER for body in BODIES]


def test_a_qembed_server_gets_plain_pairs_and_the_instruction(start_vllm: Callable[[FakeVllm], FakeVllm]) -> None:
    fake = FakeQembed()
    start_vllm(fake)
    with rerank.through_server(fake.url).open() as score:
        assert score([("q", "aa"), ("p", "b")], "judge") == pytest.approx([0.02, 0])
    assert fake.requests == [{"model": "r", "text_1": ["q", "p"], "text_2": ["aa", "b"], "instruction": "judge"}]


def test_logprobs_of_yes_and_no_are_requested_if_the_server_tokenizes(start_vllm: Callable[[FakeVllm], FakeVllm]) -> None:
    fake = start_vllm(FakeVllm(classifies=False))
    for limit, numbers in ((None, None), (10**6, [7, 8])):
        fake.limit = limit
        with rerank.through_server(fake.url).open() as score:
            score(PAIRS, None)
        assert fake.logprob_token_ids == numbers


def test_a_text_too_long_for_the_server_is_cut_and_the_question_stays(
    start_vllm: Callable[[FakeVllm], FakeVllm],
) -> None:
    fake = start_vllm(FakeVllm(classifies=True))
    fake.limit = len((rerank.BEFORE + rerank.AFTER).encode()) + 200
    long = rerank.body("q", "word " * 100)
    with rerank.through_server(fake.url).open() as score:
        score([("q", "word " * 100), PAIRS[0]], None)
    room = fake.limit - 1 - len((rerank.BEFORE + rerank.AFTER).encode())
    assert fake.prompts == [rerank.BEFORE + long[:room] + rerank.AFTER, rerank.BEFORE + BODIES[0] + rerank.AFTER]


def test_a_server_that_answers_neither_yes_nor_no_is_refused(start_vllm: Callable[[FakeVllm], FakeVllm]) -> None:
    fake = start_vllm(FakeVllm(classifies=False))
    fake.vocabulary = ("oui", "non")
    with rerank.through_server(fake.url).open() as score, pytest.raises(QembedError, match="answers neither yes nor no"):
        score(PAIRS, None)


def test_eval_reranks_the_retrieved_texts(
    start_vllm: Callable[[FakeVllm], FakeVllm], start_server: Callable[[], FakeServer], tmp_path: Path
) -> None:
    corpus = [{"_id": str(row), "text": "b" * (5 - row) + "a" * row} for row in range(5)]
    queries = [{"_id": "q", "text": "who has most a"}]
    folder = beir_folder(tmp_path / "set", corpus, queries, "q\t4\t1\n")
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    fake, servers = start_vllm(FakeVllm(classifies=True)), (start_server(), start_server())
    options = ("--url", servers[0].url, "--baseline-url", servers[1].url, "--data", tmp_path / "few.txt", "--retrieval", folder)
    result = CliRunner().invoke(group, ["eval", *map(str, options), "--rerank", fake.url, "--json"])
    assert result.exit_code == 0, result.stderr
    (task,) = json.loads(result.stdout)["tasks"]
    assert task["settings"]["reranker"] == f"r at {fake.url}"
    assert task["settings"]["reranked"] == 50
    (metric,) = [metric for metric in task["metrics"] if metric["name"] == "nDCG@10, reranked"]
    assert metric["baseline"] == metric["candidate"] == 1
    assert len(fake.prompts) == 5
