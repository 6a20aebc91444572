"""Common client libraries. Those that need packages of their own run in build/clients, which `make test` creates."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.http import embed
from tests.e2e.launcher import Launched

pytestmark = pytest.mark.vllm

BIN = Path(__file__).parents[2] / "build" / "clients" / "bin"
CLIENTS = Path(__file__).parent / "clients"
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
TEXTS = ["an audio player", "a PDF viewer"]
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "NO_COLOR": "1"}
PROGRAMS = """
import contextlib, io, json, sys, traceback
answers = sys.stdout
for line in sys.stdin:
    request = json.loads(line)
    sys.argv, output, error = request["arguments"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(request["code"], sys.argv[0], "exec"), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps({"output": output.getvalue(), "error": error}), file=answers, flush=True)
"""


def run(*command: object, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env={**os.environ, **QUIET}, check=False, cwd=cwd
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture
def clients() -> Path:
    if not (BIN / "python").exists():
        pytest.skip("no build/clients: make build/clients/installed")
    return BIN


@pytest.fixture(scope="module")
def execute() -> Iterator[Callable[..., Any]]:
    """A function that executes Python code with arguments in build/clients and returns the JSON of its last line of output.

    All code runs in one process, because importing the frameworks takes longer than all they are used for here.
    """
    if not (BIN / "python").exists():
        pytest.skip("no build/clients: make build/clients/installed")
    command = [BIN / "python", "-c", PROGRAMS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET}
    ) as process:
        assert process.stdin
        assert process.stdout

        def answer(code: str, *arguments: str) -> Any:
            print(json.dumps({"code": code, "arguments": ["program.py", *arguments]}), file=process.stdin, flush=True)
            response = json.loads(process.stdout.readline())
            assert response["error"] is None, response
            return json.loads(response["output"].splitlines()[-1])

        yield answer
        process.stdin.close()


@pytest.fixture(scope="module")
def expected(int4_server: Launched) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "documents": np.asarray(embed(int4_server.url, input=TEXTS).vectors),
        "query": np.asarray(embed(int4_server.url, input="music player", prompt_name="query").vectors[0]),
    }


def equal(vectors: Any, expected: np.ndarray[Any, Any]) -> bool:
    return bool((np.sum(np.asarray(vectors) * expected, axis=-1) > 0.9999).all())


@pytest.mark.parametrize("script", ["langchain", "llamaindex", "lite"])
def test_a_framework_gets_the_vectors_of_documents_and_queries(
    int4_server: Launched, execute: Callable[..., Any], expected: dict[str, np.ndarray[Any, Any]], script: str
) -> None:
    output = execute((CLIENTS / f"{script}.py").read_text(), int4_server.url, int4_server.model)
    assert equal(output["documents"], expected["documents"])
    assert equal(output["async"], expected["documents"])
    assert equal(output["query"], expected["query"])
    if script == "langchain":
        assert "check_embedding_ctx_length=False" in output["refused"]


def test_langchain_gets_a_querys_vector_by_the_models_name_alone(
    int4_server: Launched, execute: Callable[..., Any], expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    lines = (
        "import json, sys\nfrom langchain_openai import OpenAIEmbeddings\nurl, model = sys.argv[1:]\n"
        "queries = OpenAIEmbeddings(model=model, base_url=url, api_key='none', check_embedding_ctx_length=False)\n"
        "print(json.dumps(queries.embed_query('music player')))"
    )
    assert equal(execute(lines, int4_server.url, f"{int4_server.model}-query"), expected["query"])


# Expressions over the variables of the page's code, printed as JSON.
PRINTED = {
    "openai": "([item.embedding for item in documents.data], query.data[0].embedding)",
    "LangChain": f"(documents.embed_documents({TEXTS}), queries.embed_query('music player'))",
    "LlamaIndex": f"(documents.get_text_embedding_batch({TEXTS}), queries.get_query_embedding('music player'))",
    "litellm": "([item['embedding'] for item in documents.data], query.data[0]['embedding'])",
}


@pytest.mark.parametrize("client", list(PRINTED))
def test_the_code_on_the_page_gets_the_right_vectors(
    int4_server: Launched, execute: Callable[..., Any], expected: dict[str, np.ndarray[Any, Any]], client: str
) -> None:
    lines = code_of_page(int4_server, client, "python")
    documents, query = execute(f"{lines}\nimport json\nprint(json.dumps({PRINTED[client]}))\n")
    assert equal(documents, expected["documents"])
    assert equal(query, expected["query"])


def test_the_curl_command_on_the_page_gets_the_right_vector(
    int4_server: Launched, expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    result = run("sh", "-c", code_of_page(int4_server, "curl", "").replace("curl ", "curl --silent --fail "))
    assert equal(json.loads(result.stdout)["data"][0]["embedding"], expected["query"])


def code_of_page(server: Launched, client: str, language: str) -> str:
    """The first lines of code under the client's heading in docs/clients.md, for this server."""
    lines = PAGE.read_text(encoding="utf-8").split(f"\n## {client}\n")[1].split(f"```{language}\n")[1].split("```")[0]
    assert "http://127.0.0.1:8000/v1" in lines
    return lines.replace("http://127.0.0.1:8000/v1", server.url).replace("sample-AWQ-INT4", server.model)


def test_openai_sync_takes_2048_texts_and_base64(int4_server: Launched) -> None:
    texts = [f"text number {number}" for number in range(2048)]
    with openai.OpenAI(base_url=int4_server.url, api_key="none", timeout=300) as client:
        batch = client.embeddings.create(model=int4_server.model, input=texts)
        alone = client.embeddings.create(model=int4_server.model, input=texts[-1], encoding_format="float")
        query = client.embeddings.create(model=int4_server.model, input="music player", extra_body={"instruction": "find"})
    assert [item.index for item in batch.data] == list(range(2048))
    assert batch.usage.prompt_tokens == batch.usage.total_tokens > 2048 * 3
    assert equal(batch.data[-1].embedding, np.asarray(alone.data[0].embedding))
    assert len(query.data) == 1


def test_openai_async(int4_server: Launched, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=int4_server.url, api_key="none", timeout=300) as client:
            return await asyncio.gather(
                *(client.embeddings.create(model=int4_server.model, input=TEXTS, dimensions=64) for _ in range(20))
            )

    prefix = expected["documents"][:, :64] / np.linalg.norm(expected["documents"][:, :64], axis=1, keepdims=True)
    for answer in asyncio.run(ask()):
        assert equal([item.embedding for item in answer.data], prefix)


def test_openai_raises_its_own_error_types(int4_server: Launched) -> None:
    with openai.OpenAI(base_url=int4_server.url, api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] is empty"):
            client.embeddings.create(model=int4_server.model, input=["a", ""])
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.embeddings.create(model="gpt-4", input="a")


def test_schemathesis_finds_no_fault(int4_server: Launched, clients: Path, tmp_path: Path) -> None:
    base = int4_server.url.removesuffix("/v1")
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "negative_data_rejection,unsupported_method,allow_header_conformance"
    )
    result = run(
        *(clients / "st", "run", f"{base}/openapi.json", "--checks", checks, "--max-examples", 40, "--seed", 7),
        *("--phases", "examples,coverage,fuzzing", "--request-timeout", 60, "--no-shrink"),
        check=False,
        cwd=tmp_path,  # it writes a cache into its working folder
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert embed(int4_server.url, input="good").status == 200
