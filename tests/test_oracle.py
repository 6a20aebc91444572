"""Vectors of made folders, in each variant, compared with those of sentence-transformers on a CPU in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.eval import texts as eval_texts
from qembed.quantize import checks
from qembed.quantize.verify import vectors as layerwise_vectors
from qembed.vectors import reference
from tests.checkpoints import END
from tests.embedders import VARIANTS, joined, write_embedder, write_texts
from tests.search.conftest import json_output, write

pytestmark = pytest.mark.slow
TEXTS = [
    "a cat",
    "The Dog SLEEPS on the mat, and the mat lies in front of the door.",
    "ΟΔΟΣ and Straße",
    "0123456789" * 4,
]
SAME = 0.9999
LENGTHS = 1e-4
"""Largest relative difference of two vectors' lengths."""


def oracle(folder: Path, texts: list[str], **encoding: Any) -> NDArray[np.float32]:
    """The vectors of sentence-transformers; `encoding` are further arguments of its `encode`."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    return np.asarray(model.encode(texts, batch_size=3, show_progress_bar=False, **encoding), np.float32)


def assert_same(vectors: NDArray[Any], expected: NDArray[Any]) -> None:
    lengths, expected_lengths = np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1)
    cosines = (vectors * expected).sum(1) / lengths / expected_lengths
    assert cosines.min() >= SAME
    np.testing.assert_allclose(lengths, expected_lengths, rtol=LENGTHS)


def model_inputs(checkpoint: Checkpoint, texts: list[str]) -> list[str]:
    """Texts with the prompt of those that no other is asked for, cut to the context, as eval and search read them."""
    prompted = [checkpoint.embedder.document_prompt + text for text in texts]
    return eval_texts.cut(prompted, checkpoint.tokenizer(), checkpoint.embedder.context).texts


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", **VARIANTS[name])
    expected = oracle(checkpoint.folder, TEXTS)
    inputs = model_inputs(checkpoint, TEXTS)
    assert_same(reference.embed(reference.load(checkpoint), inputs), expected)
    rows = sorted((checkpoint.tokenizer().encode(text).ids for text in inputs), key=len)
    order = sorted(range(len(inputs)), key=lambda index: len(checkpoint.tokenizer().encode(inputs[index]).ids))
    import torch

    shape = checks.shape_of(checkpoint, 64)
    by_layer = layerwise_vectors(checkpoint, shape, rows, torch.device("cpu"), lambda: None).numpy()
    unit = expected[order] / np.linalg.norm(expected[order], axis=1, keepdims=True)
    assert_same(by_layer, unit)


QUESTIONS = ["ΟΔΟΣ and straße", "which dog sleeps on the mat?"]
SEARCHED = {
    "no prompts": {},
    "mean, no-normalize": joined("mean", "no-normalize"),
    "dense, lower-case": joined("dense", "lower-case"),
    "prompts, bidirectional": {**joined("bidirectional"), "prompts": {"prompts": {"query": "Q: ", "passage": "P: "}}},
    "a default prompt that is not for queries": {"prompts": {"prompts": {"passage": "P: "}, "default_prompt_name": "passage"}},
}


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("dimensions", [None, 48])
def test_search_finds_what_sentence_transformers_finds(name: str, dimensions: int | None, tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", **SEARCHED[name])
    documents = oracle(checkpoint.folder, TEXTS)[:, :dimensions]
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    about = {"model": str(checkpoint.folder), "dtype": "float32"}
    write(tmp_path / "v.parquet", documents, {"text": TEXTS}, about)
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    queries = oracle(checkpoint.folder, QUESTIONS, prompt_name="query")[:, :dimensions]
    cosines = queries @ documents.T / np.linalg.norm(queries, axis=1, keepdims=True)
    result = json_output("search", *QUESTIONS, "--index", tmp_path / "i.faiss", "-k", len(TEXTS))
    for query, expected in zip(result["queries"], cosines, strict=True):
        scores = {hit["columns"]["text"]: hit["score"] for hit in query["hits"]}
        assert [scores[text] for text in TEXTS] == pytest.approx(expected, abs=1e-4)


QUANTIZED = ["last", "mean", "mean, bidirectional, no-normalize, llama", "dense, no-normalize", "two dense, bidirectional"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_fidelity_of_quantize_is_that_of_eval(name: str, tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", **VARIANTS[name])
    texts = write_texts(tmp_path / "texts.jsonl")
    int4 = tmp_path / "int4"
    command = ["quantize", "--model", str(checkpoint.folder), "-o", str(int4), "--calibration", str(texts)]
    command += ["--group-size", "64", "--device", "cpu", "--json"]
    result = CliRunner().invoke(group, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)["fidelity"]
    held_out = _held_out(checkpoint, texts, printed["texts"])
    original, quantized = (
        reference.embed(reference.load(Checkpoint(folder.name, folder)), held_out) for folder in (checkpoint.folder, int4)
    )
    cosines = (original * quantized).sum(1) / np.linalg.norm(original, axis=1) / np.linalg.norm(quantized, axis=1)
    assert printed["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert printed["min_cosine"] == pytest.approx(cosines.min(), abs=1e-3)
    written = Checkpoint("int4", int4).embedder
    source = checkpoint.embedder
    fields = ("attention", "pooling", "normalized", "width", "context", "default_prompt", "lower_case")
    assert [getattr(written, field) for field in fields] == [getattr(source, field) for field in fields]
    card = (int4 / "README.md").read_text()
    state = "the mean of all tokens" if source.pooling == "mean" else "the hidden state of the last token"
    for part in (state, END, f"{source.width} numbers", *(["dense layer"] if source.dense else [])):
        assert part in card
    assert ("**not scaled to unit length**" in card) is not source.normalized
    hashed = json.loads((int4 / "qembed.json").read_text())["files"]
    assert {f"{layer.name}/model.safetensors" for layer in source.dense} <= hashed.keys()
    verified = CliRunner().invoke(group, ["quantize", "--verify", str(int4), "--device", "cpu", "--json"])
    assert verified.exit_code == 0, verified.output


def _held_out(checkpoint: Checkpoint, path: Path, count: int) -> list[str]:
    """The texts that `quantize` held out, as it reads them."""
    from qembed.quantize import calibration_texts
    from qembed.quantize.calibration import prepare

    drawn = calibration_texts.read(str(path), calibration_texts.DEFAULT_COUNT, 0)
    prepared = prepare(drawn, checkpoint, max_tokens=512, check=count, seed=0)
    embedder = checkpoint.embedder
    return [drawn.texts[number].model_input(embedder.prompts, embedder.document_prompt) for number in sorted(prepared.check)]
