"""`qembed search`: its results are those of a comparison with every vector; errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.cli import group
from qembed.text.prompts import DEFAULT_INSTRUCTION, instruct
from qembed.vectors import reference
from tests.eval.conftest import SERVED, FakeServer
from tests.search.conftest import ABOUT, error_line, json_output, qembed, write
from tests.test_rerank import FakeVllm, by_hand

TEXTS = [f"the {size} {thing} number {number}" for number in range(5) for size in ("big", "small", "red", "old")
         for thing in ("house", "stone", "cat", "bird")]  # fmt: skip
START = Callable[[], FakeServer]


@pytest.fixture
def index(tmp_path: Path, start_server: START) -> tuple[Path, FakeServer]:
    """An index of TEXTS by the fake server's vectors."""
    fake = start_server()
    vectors = np.array([fake.vector(text) for text in TEXTS], np.float32)
    write(tmp_path / "v.parquet", vectors, {"text": TEXTS, "length": [len(text) for text in TEXTS]})
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    return tmp_path / "i.faiss", fake


def nearest(fake: FakeServer, query_text: str, depth: int) -> list[tuple[str, float]]:
    """Ids and cosines by numpy."""
    cosines = np.array([fake.vector(text) for text in TEXTS]) @ np.array(fake.vector(query_text))
    return [(f"doc{row}", float(cosines[row])) for row in np.argsort(-cosines)[:depth]]


def test_results_are_the_nearest_by_cosine_with_the_query_prompt(index: tuple[Path, FakeServer]) -> None:
    path, fake = index
    result = json_output("search", "music player", "a cat", "--index", path, "--url", fake.url, "-k", 7)
    assert [query["text"] for query in result["queries"]] == ["music player", "a cat"]
    assert fake.inputs == [instruct(DEFAULT_INSTRUCTION) + text for text in ("music player", "a cat")]
    for query, query_text in zip(result["queries"], fake.inputs, strict=True):
        expected = nearest(fake, query_text, 7)
        assert [hit["id"] for hit in query["hits"]] == [name for name, _ in expected]
        assert [hit["score"] for hit in query["hits"]] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)
        assert [hit["rank"] for hit in query["hits"]] == list(range(1, 8))
    hit = result["queries"][0]["hits"][0]
    text = TEXTS[int(hit["id"].removeprefix("doc"))]
    assert (hit["columns"], hit["rerank"]) == ({"text": text, "length": len(text)}, None)


def test_prompts_and_instructions(index: tuple[Path, FakeServer]) -> None:
    path, fake = index
    hits = json_output("search", TEXTS[9], "--index", path, "--url", fake.url, "--prompt", "document")["queries"][0]["hits"]
    assert (hits[0]["id"], len(hits)) == ("doc9", 10)
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    json_output("search", "x", "--index", path, "--url", fake.url, "--instruction", "Find animals")
    assert fake.inputs[-2:] == [TEXTS[9], "Instruct: Find animals\nQuery:x"]
    assert "the model has document, query" in error_line("search", "x", "--index", path, "--url", fake.url, "--prompt", "no")
    assert "is empty" in error_line("search", "x", "--index", path, "--url", fake.url, "--instruction", " ")
    json_output("search", "x", "--index", path, "--url", fake.url, "--prompt", "")
    assert fake.inputs[-1] == "x"
    for prompt in ("query", ""):
        assert "leave one out" in error_line("search", "x", "--index", path, "--prompt", prompt, "--instruction", "i")


def test_a_server_of_another_model_needs_its_prompt(
    index: tuple[Path, FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fake = index
    monkeypatch.setattr("tests.eval.conftest.SERVED", "e5-mistral")
    write(
        tmp_path / "v.parquet",
        np.array([fake.vector(text) for text in TEXTS], np.float32),
        about={**ABOUT, "model": "e5-mistral"},
    )
    json_output("index", tmp_path / "v.parquet", "-o", path)
    for prompt in ([], ["--prompt", "query"]):
        line = error_line("search", "x", "--index", path, "--url", fake.url, *prompt)
        assert "prompts of e5-mistral" in line
        assert "--model" in line
    json_output("search", "x", "--index", path, "--url", fake.url, "--prompt", "")
    json_output("search", "x", "--index", path, "--url", fake.url, "--instruction", "Find")
    assert fake.inputs == ["x", "Instruct: Find\nQuery:x"]


def test_the_key_may_come_from_a_file(index: tuple[Path, FakeServer], tmp_path: Path) -> None:
    path, fake = index
    fake.key = "first-key"
    (tmp_path / "keys").write_text("first-key\n")
    assert "asks for a key" in error_line("search", "x", "--index", path, "--url", fake.url)
    json_output("search", "x", "--index", path, "--url", fake.url, "--api-key-file", tmp_path / "keys")
    assert "for running servers" in error_line("search", "x", "--index", path, "--api-key-file", tmp_path / "keys")


def test_queries_from_standard_input(index: tuple[Path, FakeServer]) -> None:
    path, fake = index
    result = CliRunner().invoke(group, ["search", "-", "--index", str(path), "--url", fake.url, "--json"], input="one\n\ntwo\n")
    assert [query["text"] for query in json.loads(result.stdout)["queries"]] == ["one", "two"]


def test_the_table_shows_ids_cosines_and_texts(index: tuple[Path, FakeServer]) -> None:
    path, fake = index
    code, out, _ = qembed("search", TEXTS[9], "--index", path, "--url", fake.url, "--prompt", "document", "-k", 2)
    assert code == 0
    header, first, _ = out.splitlines()
    assert header.split() == ["cosine", "id", "length", "text"]
    assert first.split() == ["1", "1.0000", "doc9", str(len(TEXTS[9])), *TEXTS[9].split()]


@pytest.mark.parametrize(("kind", "option"), [("ivf-flat", "--nprobe"), ("hnsw", "--ef-search")])
def test_exact_and_wide_searches_of_an_approximate_index_are_exact(
    tmp_path: Path, index: tuple[Path, FakeServer], kind: str, option: str
) -> None:
    _, fake = index
    path = tmp_path / "a.faiss"
    summary = json_output("index", tmp_path / "v.parquet", "-o", path, "--kind", kind)
    search = ["search", "a stone", "--index", path, "--url", fake.url]
    expected = [name for name, _ in nearest(fake, instruct(DEFAULT_INSTRUCTION) + "a stone", 10)]
    for extra in (["--exact"], [option, 80]):
        assert [hit["id"] for hit in json_output(*search, *extra)["queries"][0]["hits"]] == expected
    assert json_output(*search)["width"] == summary["width"]
    assert json_output(*search, "--exact")["width"] is None
    assert f"omit {option}" in error_line(*search, "--exact", option, 4)
    other = {"--nprobe": "--ef-search", "--ef-search": "--nprobe"}[option]
    assert f"is {kind}, which has no such setting" in error_line(*search, other, 4)


def test_without_a_server_the_recorded_model_embeds_the_query(tmp_path: Path, fp16: Path) -> None:
    model = reference.load(find(str(fp16)))
    texts = TEXTS[:20]
    vectors = reference.embed(model, texts)
    about = {**ABOUT, "model": str(fp16)}
    write(tmp_path / "v.parquet", vectors, {"text": texts}, about)
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    ask = ["search", texts[4], "--index", tmp_path / "i.faiss"]
    hit = json_output(*ask, "--prompt", "document")["queries"][0]["hits"][0]
    assert hit["id"] == "doc4"
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    query = reference.embed(model, [instruct("Find") + texts[4]])[0]
    scores = [hit["score"] for hit in json_output(*ask, "--instruction", "Find", "-k", 20)["queries"][0]["hits"]]
    assert scores == pytest.approx(sorted(vectors @ query, reverse=True), abs=1e-5)
    long = error_line("search", "x" * 200, "--index", tmp_path / "i.faiss", "--prompt", "document")
    assert "tokens; the model takes 96" in long


def test_query_vectors_are_cut_to_the_dimensions_of_the_index(tmp_path: Path, start_server: START) -> None:
    fake = start_server()
    vectors = np.array([fake.vector(text) for text in TEXTS], np.float32)
    write(tmp_path / "v.parquet", vectors[:, :16], {"text": TEXTS})
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    hits = json_output("search", TEXTS[3], "--index", tmp_path / "i.faiss", "--url", fake.url, "--prompt", "document")
    assert hits["queries"][0]["hits"][0]["id"] == "doc3"
    assert hits["queries"][0]["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    write(tmp_path / "v.parquet", vectors[:, :16], {"text": TEXTS}, about=None)
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    line = error_line("search", "x", "--index", tmp_path / "i.faiss", "--url", fake.url)
    assert f"its vectors have 16 dimensions, those of {SERVED} have 64" in line
    assert "does not say which model made its vectors" in error_line("search", "x", "--index", tmp_path / "i.faiss")


def test_a_model_other_than_the_indexs_is_refused(tmp_path: Path, start_server: START, fp16: Path) -> None:
    fake = start_server()
    vectors = np.array([fake.vector(text) for text in TEXTS], np.float32)
    write(tmp_path / "v.parquet", vectors, {"text": TEXTS}, {**ABOUT, "model": "Qwen/Qwen3-Embedding-0.6B"})
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    ask = ["search", "x", "--index", tmp_path / "i.faiss"]
    line = error_line(*ask, "--url", fake.url)
    assert f"its vectors are of Qwen/Qwen3-Embedding-0.6B, the question's would be of {SERVED}" in line
    assert fake.inputs == []
    assert json_output(*ask, "--url", fake.url, "--any-model")["queries"][0]["hits"]
    assert "the question's would be of tiny" in error_line(*ask, "--model", fp16)
    fake.dimension = 32
    assert f"its vectors have 64 dimensions, those of {SERVED} have 32" in error_line(*ask, "--url", fake.url, "--any-model")


def test_different_names_of_the_same_model_match() -> None:
    from qembed.search.query import family

    names = ("Qwen/Qwen3-Embedding-0.6B", "./Qwen3-Embedding-0.6B-AWQ-INT4", "qwen3-embedding-0.6b", "/a/Qwen3-Embedding-0.6B/")
    assert {family(name) for name in names} == {"qwen3-embedding-0.6b"}
    assert family("Qwen/Qwen3-Embedding-4B") != family(names[0])


def test_a_reranker_sorts_the_nearest(index: tuple[Path, FakeServer], start_vllm: Callable[[FakeVllm], FakeVllm]) -> None:
    path, fake = index
    reranking_server = start_vllm(FakeVllm(classifies=True))
    ask = ["search", "a cat", "--index", path, "--url", fake.url, "-k", 4, "--rerank", reranking_server.url]
    hits = json_output(*ask, "--candidates", 30, "--instruction", "Find animals")["queries"][0]["hits"]
    near = [name for name, _ in nearest(fake, instruct("Find animals") + "a cat", 30)]
    bodies = {name: rerank.body("a cat", TEXTS[int(name[3:])], "Find animals") for name in near}
    assert sorted(reranking_server.prompts) == sorted(rerank.BEFORE + body + rerank.AFTER for body in bodies.values())
    scores = {name: FakeVllm.score(rerank.BEFORE + body + rerank.AFTER) for name, body in bodies.items()}
    assert [hit["id"] for hit in hits] == sorted(near, key=lambda name: -scores[name])[:4]
    assert [hit["rerank"] for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:4])
    reranking_server.prompts.clear()
    result = json_output(*ask)
    assert (len(reranking_server.prompts), len(result["queries"][0]["hits"]), result["reranker"]) == (
        50,
        4,
        f"r at {reranking_server.url}",
    )
    _, out, _ = qembed(*ask)
    assert out.splitlines()[0].split() == ["rerank", "cosine", "id", "length", "text"]


def test_a_reranker_through_transformers(index: tuple[Path, FakeServer], reranker: Path) -> None:
    path, fake = index
    result = json_output("search", "a", "--index", path, "--url", fake.url, "--rerank", reranker, "--candidates", 3, "-k", 3)
    hits = result["queries"][0]["hits"]
    expected = {hit["id"]: by_hand(reranker, rerank.body("a", hit["columns"]["text"])) for hit in hits}
    assert [hit["rerank"] for hit in hits] == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-5)
    assert {hit["id"]: hit["rerank"] for hit in hits} == pytest.approx(expected, abs=1e-5)


def test_texts_to_rerank_come_from_the_text_column(
    tmp_path: Path, start_server: START, start_vllm: Callable[[FakeVllm], FakeVllm]
) -> None:
    fake, reranking_server = start_server(), start_vllm(FakeVllm(classifies=True))
    vectors = np.array([fake.vector(text) for text in TEXTS], np.float32)

    def search_arguments(columns: dict[str, Any]) -> list[Any]:
        write(tmp_path / "v.parquet", vectors, columns)
        json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
        return ["search", "a", "--index", tmp_path / "i.faiss", "--url", fake.url, "--rerank", reranking_server.url]

    assert "keeps none: make its vectors with qembed embed --keep text" in error_line(*search_arguments({}))
    ask = search_arguments({"title": ["a"] * 80, "body": TEXTS, "stock": range(80)})
    assert "keeps title, body: name one with --text-column" in error_line(*ask)
    assert "keeps title, body" in error_line(*ask, "--text-column", "stock")
    assert json_output(*ask, "--text-column", "title")["queries"][0]["hits"][0]["rerank"] == pytest.approx(0.99)
    assert json_output(*search_arguments({"body": TEXTS, "stock": range(80)}))["text_column"] == "body"
    ask = search_arguments({"text": [None, "a"] * 40})
    assert "has no text in the column" in error_line(*ask)


def test_invalid_queries_and_options_are_one_line(index: tuple[Path, FakeServer], tmp_path: Path) -> None:
    path, fake = index
    ask = ["--index", path, "--url", fake.url]
    assert "nothing to search for" in error_line("search", *ask)
    assert "question 2 is empty" in error_line("search", "a", " \n", *ask)
    assert "question 1 is empty" in error_line("search", "\u200b", *ask)
    assert "question 1 is not UTF-8" in error_line("search", "a\udcff", *ask)
    assert f"-k 81: {path} has only 80 vectors" in error_line("search", "a", *ask, "-k", 81)
    assert "--candidates 81: " in error_line("search", "a", *ask, "--rerank", "x", "--candidates", 81)
    assert "fewer than the 20" in error_line("search", "a", *ask, "--rerank", "x", "--candidates", 5, "-k", 20)
    assert "--candidates needs --rerank" in error_line("search", "a", *ask, "--candidates", 5)
    assert "with --url a server does" in error_line("search", "a", *ask, "--engine", "vllm")
    assert "nothing answers there" in error_line("search", "a", "--index", path, "--url", "http://127.0.0.1:9")
    assert "no such folder" in error_line("search", "a", *ask, "--rerank", "./none")
    assert "no such file; make an index" in error_line("search", "a", "--index", tmp_path / "none.faiss")
    assert "no such folder" in error_line("search", "a", "--index", path, "--model", "./none")
    line = error_line("search", "a", "--index", path)
    assert f"its vectors are of {SERVED}, which is not here" in line
    assert "name it with --model, or a --url" in line
    fake.refusal = 400
    assert "the engine is dead" in error_line("search", "a", *ask)
    fake.refusal = None
    fake.vectors_by_text[instruct(DEFAULT_INSTRUCTION) + "a"] = [0.0] * 64
    assert "a vector that is zero" in error_line("search", "a", *ask, code=1)
    assert len(fake.inputs) == 1


def test_all_vectors_are_returned_if_fewer_than_the_default(tmp_path: Path, start_server: START) -> None:
    fake = start_server()
    write(tmp_path / "v.parquet", np.array([fake.vector(text) for text in TEXTS[:3]], np.float32), {"text": TEXTS[:3]})
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss", "--kind", "hnsw")
    assert len(json_output("search", "a", "--index", tmp_path / "i.faiss", "--url", fake.url)["queries"][0]["hits"]) == 3


def test_all_kept_columns_are_shown_or_a_hint_if_there_are_none(tmp_path: Path, start_server: START) -> None:
    fake = start_server()
    vectors = np.array([fake.vector(text) for text in TEXTS[:3]], np.float32)

    def table(columns: dict[str, Any]) -> tuple[str, str]:
        write(tmp_path / "v.parquet", vectors, columns)
        json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
        code, out, err = qembed("search", "a", "--index", tmp_path / "i.faiss", "--url", fake.url)
        assert code == 0
        return out, err

    out, err = table({"body": ["[b]one[/b]", "two\nlines", "three"], "title": ["t1", "t2", None], "stock": [4, 5, 6]})
    assert out.splitlines()[0].split() == ["cosine", "id", "body", "title", "stock"]
    for cell in ("[b]one[/b]", "two lines", "three", "t1", "t2", "4", "5", "6"):
        assert cell in out
    assert "--keep" not in err
    out, err = table({})
    assert out.splitlines()[0].split() == ["cosine", "id"]
    assert "qembed embed --keep" in err
    assert json_output("search", "a", "--index", tmp_path / "i.faiss", "--url", fake.url)["columns"] == []


def test_a_missing_package_is_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "v.parquet", np.eye(4, dtype=np.float32))
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert "pip install 'faiss-cpu" in error_line("index", source, "-o", tmp_path / "i.faiss", code=3)


def test_interactive_answers_each_line_with_models_loaded_once(
    index: tuple[Path, FakeServer], reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fake = index
    loaded = []
    load = rerank._transformers
    monkeypatch.setattr(rerank, "_transformers", lambda *arguments: loaded.append(arguments) or load(*arguments))
    ask = ["--index", str(path), "--url", fake.url, "-k", "3", "--json"]
    ask += ["--rerank", str(reranker), "--candidates", "4"]
    result = CliRunner().invoke(group, ["search", "--interactive", *ask], input=b"one\n \n\x00\n\xff\ntwo\n")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["queries"][0]["text"] for line in lines] == ["one", "\0", "?", "two"]
    assert ["hits" in line["queries"][0] for line in lines] == [True, False, False, True]
    assert [line["error"]["exit_code"] for line in lines[1:3]] == [2, 2]
    assert "is empty" in lines[1]["error"]["message"]
    assert "not UTF-8" in lines[2]["error"]["message"]
    assert len(loaded) == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("qembed: ")] == [
        f"qembed: {line['error']['message']}" for line in lines[1:3]
    ]
    alone = json_output("search", "two", *ask[:-5], "--rerank", reranker, "--candidates", 4)
    assert lines[3] == alone


def test_interactive_takes_its_questions_from_standard_input_alone(index: tuple[Path, FakeServer]) -> None:
    path, _ = index
    assert "leave TEXT out" in error_line("search", "-i", "a cat", "--index", path)
