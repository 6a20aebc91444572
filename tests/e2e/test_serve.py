"""`qembed serve` against the real vLLM, through the openai client."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from qembed.checkpoint.find import find, source_of
from qembed.client import embeddings
from qembed.eval.texts import HELDOUT, read
from qembed.vectors import reference
from qembed.vllm.kernels import this_cpu
from tests.e2e.launcher import Launched, all_gone

pytestmark = pytest.mark.vllm

Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every sixth held-out text, of all languages and lengths, and some of one to three words."""
    return [item.text for item in read(HELDOUT).texts[::6]] + ["a", "INT4", "Zürich", "two words", "今日は", "def f(): pass"]


@pytest.fixture(scope="module")
def served(int4_server: Launched, texts: list[str]) -> Vectors:
    return embeddings.embed(texts, url=int4_server.url, batch_size=32)


@pytest.fixture(scope="module")
def expected(int4_checkpoint: Path, texts: list[str]) -> Vectors:
    """The same weights, dequantized to float32, through transformers: an independent reader of the packed tensors."""
    return reference.embed(reference.load(find(str(int4_checkpoint))), texts)


def cosines(a: Vectors, b: Vectors) -> Vectors:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urlsplit(url).port or 0)) != 0


def ask(server: Launched, inputs: list[str], **options: Any) -> Vectors:
    with openai.OpenAI(base_url=server.url, api_key="none", timeout=300) as api:
        answer = api.embeddings.create(model=server.model, input=inputs, **options)
    return np.asarray([item.embedding for item in answer.data], np.float32)


def test_vectors_have_unit_length_and_no_nan(served: Vectors) -> None:
    assert np.isfinite(served).all()
    np.testing.assert_allclose(np.linalg.norm(served, axis=1), 1, atol=1e-5)


def test_the_served_weights_are_the_packed_ones(served: Vectors, expected: Vectors) -> None:
    assert cosines(served, expected).min() > 0.999


def test_a_batch_and_its_texts_one_by_one_agree(int4_server: Launched, texts: list[str], served: Vectors) -> None:
    alone = embeddings.embed(texts[::4], url=int4_server.url, batch_size=1)
    assert cosines(alone, served[::4]).min() > 0.9999


def test_a_vector_does_not_depend_on_its_neighbours(int4_server: Launched, texts: list[str], served: Vectors) -> None:
    reversed_order = embeddings.embed(texts[::-1], url=int4_server.url, batch_size=24)[::-1]
    assert cosines(reversed_order, served).min() > 0.9999


def test_dimensions_give_the_renormalised_prefix(int4_server: Launched, texts: list[str]) -> None:
    whole = ask(int4_server, texts[:8])
    width = whole.shape[1]
    sizes = [size for size in (32, 64, 128, 256, 512, 768, 1024, 2048, 2560, 4096) if size < width]
    assert sizes
    for size in [*sizes, width]:
        cut = ask(int4_server, texts[:8], dimensions=size)
        prefix = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        assert cut.shape == (8, size)
        np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
        assert cosines(cut, prefix).min() > 0.9999


def test_any_dimensions_from_32_to_the_width_are_given(int4_server: Launched) -> None:
    assert ask(int4_server, ["text"], dimensions=33).shape == (1, 33)
    for size in (31, 257):
        with pytest.raises(openai.BadRequestError, match="32 to 256"):
            ask(int4_server, ["text"], dimensions=size)


def test_base64_and_float_agree(int4_server: Launched, texts: list[str]) -> None:
    """The openai package asks for base64 unless told otherwise, and decodes it itself."""
    base64 = ask(int4_server, texts[:8])
    floats = ask(int4_server, texts[:8], encoding_format="float")
    assert cosines(base64, floats).min() > 0.99999


def test_the_ready_line_describes_the_server(int4_server: Launched, int4_checkpoint: Path) -> None:
    ready = int4_server.ready
    with openai.OpenAI(base_url=int4_server.url, api_key="none") as api:
        name, *others = [model.id for model in api.models.list().data]
    assert name == ready["model"] == int4_checkpoint.name
    assert set(others) == {f"{name}-query", f"{name}-document"}
    assert ready["int4"] is True
    assert ready["device"] in ("cpu", "cuda")
    assert ready["memory_bytes"] > ready["weights_bytes"] > 0


@pytest.mark.usefixtures("needs_proc")
def test_no_process_loads_libraries_that_a_server_never_uses(int4_server: Launched) -> None:
    pids = int4_server.started()
    assert len(pids) >= 2
    for pid in pids:
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert [name for name in ("pandas", "scipy", "sklearn", "ray", "cv2", "grpc") if f"/{name}/" in libraries] == []


def test_a_text_beyond_the_limit_is_refused_with_the_limit_in_the_message(int4_server: Launched) -> None:
    from qembed.errors import BadInput

    with pytest.raises(BadInput, match=str(int4_server.ready["max_model_len"])):
        embeddings.embed(["word " * 2 * int4_server.ready["max_model_len"]], url=int4_server.url)
    assert len(embeddings.embed(["a good text"], url=int4_server.url)) == 1


@pytest.mark.usefixtures("needs_proc")
def test_without_avx512_the_plugin_serves_int4_and_ctrl_c_ends_all(
    int4_checkpoint: Path, texts: list[str], expected: Vectors
) -> None:
    """vLLM's AVX2 build has no INT4 kernel. On a newer CPU this test makes vLLM load that build."""
    avx2 = {"PYTHONPATH": str(Path(__file__).parent / "avx2")}
    arguments = (
        "--int4",
        "--model",
        int4_checkpoint,
        "--port",
        0,
        "--served-model-name",
        "mine",
        "--verbose",
    )
    with Launched(*arguments, env=avx2) as server:
        server.wait_ready()
        line = re.fullmatch(
            r"(http://127\.0\.0\.1:\d+/v1)  model mine \(INT4\)  vectors .*"
            r"  device cpu \(float32, qembed's INT4 kernel\)  memory .*\n",
            server.out,
        )
        assert line, server.out
        assert "computes in float32, qembed's INT4 kernel: " in server.err
        assert "Using Int4LinearKernel" in server.err
        vectors = embeddings.embed(texts, url=line[1], model="mine")
        assert cosines(vectors, expected).min() > 0.99999
        assert len(server.started()) >= 2
        shared = server.shared_memory()
        assert server.signal(signal.SIGINT) == 0
        assert server.started() == []
        assert not any(path.exists() for path in shared)
        assert port_is_free(line[1])


@pytest.mark.skipif("avx512f" not in this_cpu().flags, reason="vLLM's build for this CPU has no INT4 kernel")
@pytest.mark.parametrize(
    ("disabled", "dtype", "kernel", "used"),
    [
        ("Int4LinearKernel", "auto", "vllm", "CPUWNA16LinearKernel"),
        ("CPUWNA16LinearKernel", "bfloat16", "qembed", "Int4LinearKernel"),
    ],
)
def test_the_ready_line_names_the_kernel_in_use(
    int4_checkpoint: Path, texts: list[str], expected: Vectors, disabled: str, dtype: str, kernel: str, used: str
) -> None:
    arguments = ("--int4", "--model", int4_checkpoint, "--port", 0, "--dtype", dtype, "--json", "--verbose")
    with Launched(*arguments, env={"VLLM_DISABLED_KERNELS": disabled}) as server:
        server.wait_ready()
        assert (server.ready["dtype"], server.ready["kernel"]) == ("bfloat16", kernel)
        assert f"Using {used}" in server.err
        assert cosines(embeddings.embed(texts[:16], url=server.url), expected[:16]).min() > 0.999


@pytest.mark.usefixtures("needs_proc")
def test_fp16_serves_the_source_and_without_restarts_a_dead_engine_ends_the_server(
    int4_checkpoint: Path, texts: list[str]
) -> None:
    with Launched(
        "--fp16", "--model", int4_checkpoint, "--port", 0, "--dtype", "float32", "--max-restarts", 0, "--json"
    ) as server:
        server.wait_ready()
        source = find(source_of(find(str(int4_checkpoint))))
        exact = reference.embed(reference.load(source), texts[:16])
        assert cosines(embeddings.embed(texts[:16], url=server.url), exact).min() > 0.99999
        engine = next(pid for pid in server.started() if "Engine" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(90) == 1
        assert server.err.splitlines()[-1].startswith("qembed: vLLM ended: ")
        assert server.started() == []


@pytest.mark.usefixtures("needs_proc")
def test_sigterm_while_starting_ends_all(int4_checkpoint: Path) -> None:
    with Launched("--int4", "--model", int4_checkpoint, "--port", 0) as server:
        assert len(server.wait_stage("starting the engine")) >= 2
        assert server.signal(signal.SIGTERM) == 143
        assert server.started() == []
        assert server.out == ""


@pytest.mark.usefixtures("needs_proc")
def test_vllm_does_not_outlive_a_killed_qembed(int4_checkpoint: Path) -> None:
    with Launched("--int4", "--model", int4_checkpoint, "--port", 0) as server:
        pids = server.wait_stage("starting the engine")
        assert len(pids) >= 2
        server.signal(signal.SIGKILL)
        assert all_gone(pids)
        assert server.started() == []
