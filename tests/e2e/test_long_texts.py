"""Texts longer than --max-num-batched-tokens are computed in pieces."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qembed.checkpoint.find import SAMPLE, find
from qembed.client import embeddings
from qembed.vectors import reference
from tests.e2e.http import embed
from tests.e2e.launcher import Launched
from tests.e2e.test_serve import cosines

pytestmark = pytest.mark.vllm
POSITIONS = 32_768
WORDS = ["river", "stone", "music", "window", "paper", "engine", "garden", "silver", "bridge", "market"]
BATCH = ("--max-num-batched-tokens", 2048)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's first two layers, with as many positions as Qwen3-Embedding has."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("long") / "long"
    shutil.copytree(find(SAMPLE).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": POSITIONS}))
    tensors = load_file(folder / "model.safetensors")
    other_layers = re.compile(r"layers\.(?!0\.|1\.)\d")
    first_layers = {name: tensor for name, tensor in tensors.items() if not other_layers.search(name)}
    save_file(first_layers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(two_layers: Path) -> Iterator[Launched]:
    with Launched("--fp16", "--model", two_layers, "--port", 0, "--dtype", "float32", "--json", *BATCH) as process:
        yield process


def text(words: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def test_the_default_limit_is_all_positions_and_vectors_of_any_length_are_right(server: Launched, two_layers: Path) -> None:
    lengths = (3, 26_000, 40, 1_500, 1_900, 5_000, 1, 9_000)
    texts = [text(words, seed) for seed, words in enumerate(lengths)]
    tokens = [len(encoding.ids) for encoding in find(str(two_layers)).tokenizer().encode_batch(texts)]
    assert 30_000 < max(tokens) <= POSITIONS
    expected = reference.embed(reference.load(find(str(two_layers))), texts)  # while the server starts
    server.wait_ready()
    assert server.ready["max_model_len"] == POSITIONS
    vectors = embeddings.embed(texts, url=server.url, batch_size=len(texts))
    assert cosines(vectors, expected).min() >= 0.9999
    assert np.abs(vectors - expected).max() < 1e-4


def test_memory_for_keys_and_values_is_that_of_one_layer(server: Launched, two_layers: Path) -> None:
    server.wait_ready()
    config = find(str(two_layers)).config
    per_token = 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    assert POSITIONS * per_token <= server.ready["kv_cache_bytes"] < 1.1 * POSITIONS * per_token


def test_a_text_beyond_the_positions_is_refused(server: Launched) -> None:
    server.wait_ready()
    answer = embed(server.url, model=server.ready["model"], input=text(40_000, 0))
    assert answer.status == 400
    assert str(POSITIONS) in answer.error
