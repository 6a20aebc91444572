"""The INT8 token table in the real vLLM: stored, made at load, and refused without the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qembed.checkpoint import int8_table
from qembed.checkpoint.find import find
from qembed.client import embeddings
from qembed.eval.texts import HELDOUT, read
from qembed.vectors import reference
from tests.e2e.launcher import QEMBED, Launched
from tests.e2e.test_serve import cosines

pytestmark = pytest.mark.vllm
START = ("--port", 0, "--dtype", "float32", "--json")


def qembed(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command until it ends."""
    return subprocess.run(
        [*QEMBED, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [item.text for item in read(HELDOUT).texts[::8]]


@pytest.fixture(scope="module")
def int8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with an INT8 token table; its linear layers are rounded plainly and calibrated on little, which is quick."""
    folder = tmp_path_factory.mktemp("quantized") / "sample-int8"
    quick = ("--scales", "none", "--no-clip", "--rounding", "rtn", "--calibration-texts", "64", "--max-tokens", "64")
    result = qembed("quantize", "--model", "sample", "--output", folder, "--token-table", "int8", *quick)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_stored_table_is_served_as_its_dequantized_rows(int8_checkpoint: Path, texts: list[str]) -> None:
    with Launched("--int4", "--model", int8_checkpoint, *START) as server:
        expected = reference.embed(reference.load(find(str(int8_checkpoint))), texts)  # while the server starts
        server.wait_ready()
        vectors = embeddings.embed(texts, url=server.url, batch_size=32)
        assert cosines(vectors, expected).min() > 0.99999
        assert server.ready["int4"] is True
        assert server.ready["token_table"] == "int8"


def test_a_table_made_at_load_is_the_one_that_quantize_would_store(int4_checkpoint: Path, texts: list[str]) -> None:
    with Launched("--int4", "--model", int4_checkpoint, *START, "--token-table", "int8") as server:
        loaded = reference.load(find(str(int4_checkpoint)))
        exact = reference.embed(loaded, texts)
        weight = loaded.model.embed_tokens.weight
        columns = int8_table.column_scales(weight.data.split(int8_table.BLOCK_ROWS))
        weight.data = int8_table.dequantize(*int8_table.quantize(weight.data, columns), columns)
        expected = reference.embed(loaded, texts)
        server.wait_ready()
        vectors = embeddings.embed(texts, url=server.url, batch_size=32)
        assert cosines(vectors, expected).min() > 0.99999
        assert np.abs(vectors - expected).max() < np.abs(vectors - exact).max() / 10, "the float table is served"
        assert server.ready["token_table"] == "int8"


def test_without_the_plugin_vllm_refuses_the_checkpoint_and_names_it(int8_checkpoint: Path) -> None:
    """A vLLM that qembed did not start, with VLLM_PLUGINS="" so that it loads no plugin."""
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--runner", "pooling", "--port", "0"]
    result = subprocess.run(
        [*server, "--model", str(int8_checkpoint)],
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode != 0
    assert "Unknown quantization method: qembed_awq" in result.stderr


def test_a_server_without_the_plugin_is_refused_before_vllm_starts(int8_checkpoint: Path) -> None:
    result = qembed("serve", "--model", int8_checkpoint, "--port", 0, VLLM_PLUGINS="")
    assert (result.returncode, result.stdout) == (2, "")
    line = "qembed: VLLM_PLUGINS= leaves qembed's plugin out, which an INT8 token table needs; add qembed to it"
    assert result.stderr.splitlines() == [line]


def test_eval_reads_it_without_options(int8_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("Swifts sleep in the air.\nMauersegler schlafen im Flug.\n", encoding="utf-8")
    result = qembed("eval", "--model", int8_checkpoint, "--engine", "transformers", "--data", data, "--min-cosine", 0.9)
    assert result.returncode == 0, result.stderr
    assert "INT4 weights, INT8 token table" in result.stdout
