"""Folders as sentence-transformers publishes them, served by the real vLLM: vectors are those of sentence-transformers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.cli import group
from qembed.vectors import reference
from tests.checkpoints import END
from tests.e2e.http import embed
from tests.e2e.launcher import Launched
from tests.e2e.test_embed import start_embed, summary_of
from tests.embedders import DENSE, PROMPTS, WIDE, write_embedder, write_texts, write_voyage
from tests.test_oracle import assert_same, oracle

pytestmark = pytest.mark.vllm
BIDIRECTIONAL = {"is_causal": False}
TEXTS = [
    "a cat",
    "The Dog SLEEPS on the mat",
    "Straße and Ζ",
    "and the mat lies in front of the door of a house, which stands by the river; " + "0123456789" * 3,
]
PIECES = ("--max-num-batched-tokens", 32)
"""Fewer tokens than the longest of TEXTS has."""


@dataclass(frozen=True)
class Case:
    """A folder by the arguments of `write_embedder`, its format, and options of `qembed serve`."""

    folder: dict[str, Any]
    is_int4: bool
    options: tuple[object, ...] = ()


CASES = {
    "bidirectional Qwen3, mean, dense, no Normalize, max_seq_length, default prompt": Case(
        {
            "new_form": True, "pooling": "mean", "config": BIDIRECTIONAL, "dense": [DENSE], "normalize": False,
            "transformer": {"max_seq_length": 112}, "prompts": PROMPTS,
        },
        is_int4=False,
        options=PIECES,
    ),
    "causal Qwen2, mean, lower case, --normalize, INT4": Case(
        {"family": "qwen2", "pooling": "mean", "transformer": {"do_lower_case": True}, "normalize": False},
        is_int4=True,
        options=("--normalize", *PIECES),
    ),
    "bidirectional Llama, last token, two dense, INT4": Case(
        {"family": "llama", "config": BIDIRECTIONAL, "dense": [WIDE, DENSE]}, is_int4=True
    ),
    "Qwen3 with a linear layer in the model, INT4": Case({"voyage": True}, is_int4=True),
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A server, the checkpoint that it serves, and a folder with the same weights that sentence-transformers reads."""

    server: Launched
    checkpoint: Checkpoint
    plain: Path
    case: Case

    def expected(self, texts: list[str], size: int | None = None) -> NDArray[np.float32]:
        """Vectors of sentence-transformers, cut to `size`, and scaled where the server is to do it."""
        vectors = oracle(self.plain, texts)[:, :size]
        if self.checkpoint.embedder.normalized or "--normalize" in self.case.options:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case = CASES[request.param]
    base = tmp_path_factory.mktemp("embedders")
    plain = base / "plain"
    folder = plain
    if case.folder.get("voyage"):
        folder = write_voyage(base / "model", plain).folder
    else:
        write_embedder(plain, **case.folder)
    if case.is_int4:
        folder = quantized(folder, plain, base)
    form = "--int4" if case.is_int4 else "--fp16"
    with Launched(form, "--model", folder, "--port", 0, "--dtype", "float32", "--json", *case.options) as server:
        server.wait_ready()
        yield Served(server, find(str(folder)), plain, case)


def quantized(folder: Path, plain: Path, base: Path) -> Path:
    """Quantize `folder`, and give `plain` the dequantized weights."""
    from safetensors.torch import save_file

    texts, int4 = write_texts(base / "texts.jsonl"), base / "model-AWQ-INT4"
    command = ["quantize", "--model", folder, "-o", int4, "--calibration", texts, "--group-size", "64", "--device", "cpu"]
    result = CliRunner().invoke(group, [*map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    weights = {name: tensor.float().contiguous() for name, tensor in reference.weights(find(str(int4)))}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    return int4


def vectors(server: Launched, texts: list[str], **fields: Any) -> NDArray[np.float32]:
    return np.asarray(embed(server.url, model=server.model, input=texts, **fields).vectors, np.float32)


def test_vectors_are_those_of_sentence_transformers(served: Served) -> None:
    assert_same(vectors(served.server, TEXTS), served.expected(TEXTS))
    (item,) = embed(served.server.url, model=served.server.model, input=TEXTS[3], encoding_format="base64").json["data"]
    assert_same(np.frombuffer(base64.b64decode(item["embedding"]), "<f4")[None], served.expected(TEXTS[3:]))


@pytest.mark.parametrize("size", [32, 48, 64])
def test_any_dimensions_from_32_are_cut_and_scaled_as_the_whole_vector_is(served: Served, size: int) -> None:
    assert_same(vectors(served.server, TEXTS, dimensions=size), served.expected(TEXTS, size))


def test_dimensions_beyond_the_width_are_refused(served: Served) -> None:
    for size in (31, served.checkpoint.embedder.width + 1):
        answer = embed(served.server.url, model=served.server.model, input="a", dimensions=size)
        assert answer.status == 400
        assert f"32 to {served.checkpoint.embedder.width}" in answer.error


def test_a_request_without_its_prompt_gets_none(served: Served) -> None:
    texts = [served.checkpoint.embedder.document_prompt + text for text in TEXTS]
    assert_same(vectors(served.server, texts, prompt_name=""), served.expected(TEXTS))


def test_the_context_is_that_of_the_checkpoint(served: Served) -> None:
    context = served.checkpoint.embedder.context
    answer = embed(served.server.url, model=served.server.model, input="x" * context, prompt_name="")
    assert answer.status == 400
    assert str(context) in answer.error
    cut = vectors(served.server, ["x" * 300], truncate_prompt_tokens=-1)
    assert_same(cut, served.expected(["x" * 300]))


def test_the_ready_line_says_how_vectors_are_made(served: Served) -> None:
    ready, embedder = served.server.ready["vectors"], served.checkpoint.embedder
    assert ready["dimensions"] == embedder.width
    assert ready["normalized"] is (embedder.normalized or "--normalize" in served.case.options)
    assert ready["pooling"] == embedder.pooling
    assert ready["attention"] == embedder.attention
    assert ready["dense"] == len(embedder.dense)
    assert ready["default_prompt"] == embedder.default_prompt
    assert ready["appended_token"] == END


def test_embed_gives_the_same_vectors(served: Served, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    form = "--int4" if served.case.is_int4 else "--fp16"
    arguments = [form, "--dtype", "float32", *served.case.options, "--json"]
    summary_of(start_embed(source, "-o", out, "--model", served.checkpoint.folder, *arguments))
    assert_same(np.load(out), served.expected(TEXTS))
    through = out.with_name("through.npy")
    summary_of(start_embed(source, "-o", through, "--url", served.server.url, "--json"))
    assert_same(np.load(through), served.expected(TEXTS))
