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
from tests.embedders import VARIANTS, write_embedder, write_texts

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


def oracle(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """The vectors of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    return np.asarray(model.encode(texts, batch_size=3, show_progress_bar=False), np.float32)


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


QUANTIZED = ["last", "mean", "mean, bidirectional, llama, no normalize", "dense, no normalize", "two dense, bidirectional"]


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
