"""A server given by --url is not trusted: its answers are checked, and each error is one line."""

from __future__ import annotations

import base64
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from qembed.client import about, embeddings, metrics
from qembed.errors import BadInput, QembedError
from tests.answering import Request, answering


def encoded(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


def items(*vectors: object) -> list[dict[str, Any]]:
    return [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]


def embed(data: object, texts: int = 2) -> Any:
    answer = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    with answering(lambda _: (200, answer)) as url:
        return embeddings.embed(["text"] * texts, url=url, model="m", fields={})


GOOD = encoded(0.6, 0.8)
NAN = float("nan")


@pytest.mark.parametrize(
    "data",
    [
        items(GOOD),
        items(GOOD, GOOD, GOOD),
        items(GOOD, encoded(1.0)),
        items(GOOD, encoded()),
        items(GOOD, [0.6, "x"]),
        items(GOOD, [0.6, None]),
        items(GOOD, "not base64!"),
        items(GOOD, "AAA="),
        items(GOOD, None),
        items(GOOD, {"a": 1}),
        items(GOOD, [[0.6, 0.8]]),
        items(GOOD, encoded(NAN, 1.0)),
        items([0.6, 0.8], [1e300, 1.0]),
        items(GOOD, encoded(0.0, 0.0)),
        [*items(GOOD), *items(GOOD)],
        [{"index": "0", "embedding": GOOD}, {"index": "1", "embedding": GOOD}],
        [{"embedding": GOOD}, {"embedding": GOOD}],
        [{"index": -1, "embedding": GOOD}, {"index": 0, "embedding": GOOD}],
        "text",
        None,
        {},
        [],
        [1, 2],
    ],
)
def test_answers_without_one_vector_for_each_text_are_errors(data: object) -> None:
    with pytest.raises(QembedError) as error:
        embed(data)
    assert "\n" not in str(error.value)
    assert "127.0.0.1" in str(error.value)


def test_vectors_are_sorted_by_index() -> None:
    first, second = items(encoded(1.0, 0.0), encoded(0.0, 1.0))
    assert embed([second, first]).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("nan", 0),
        ("-5", 0),
        ("inf", 60),
        ("1e400", 60),
        ("99999999", 60),
        ("7", 7),
        ("x", 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
    ],
)
def test_seconds_to_wait_are_bounded(header: str, seconds: float) -> None:
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": header}))
    assert embeddings.retry_after(cast(Any, error)) == seconds


def test_messages_of_a_server_hold_no_control_characters() -> None:
    message = "\x1b[2J\x9b31m\u202eevil\nsecond line" + "x" * 10**6
    with answering(lambda _: (400, {"error": {"message": message}})) as url, pytest.raises(BadInput) as error:
        embeddings.embed(["text"], url=url, model="m", fields={})
    message_shown = str(error.value)
    assert message_shown.isprintable()
    assert "evil second line" in message_shown
    assert len(message_shown) < 1000


@pytest.mark.parametrize("name", ["\x1b[2Jm", "a\nb", "", "m" * 10**5, 5, None, ["m"]])
def test_invalid_model_names_are_refused(name: object) -> None:
    models = {"object": "list", "data": [{"id": name, "object": "model"}]}
    with answering(lambda _: (200, models)) as url, pytest.raises(BadInput) as error:
        embeddings.served(url)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("limit", [-1, 0, "x", True, 1.5, None])
def test_invalid_limits_count_as_unknown(limit: object) -> None:
    with answering(
        lambda _: (200, {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": limit}]})
    ) as url:
        assert embeddings.served(url) == ("m", None)


def test_metrics_that_are_not_finite_are_ignored() -> None:
    text = 'qembed_memory_bytes NaN\nqembed_memory_bytes{a="b"} 1e999\nqembed_requests_total{status="200"} +Inf\n'
    now = metrics.parse(f'{text}{metrics.LATENCIES[0]}_bucket{{le="no"}} 1\n')
    reading = metrics.read(now, None, 1.0)
    assert reading.memory_bytes is None
    assert reading.requests == {}
    assert reading.latency["p50"] is None


def test_dtype_and_version_of_a_server_are_one_printable_line() -> None:
    def answer(request: Request) -> tuple[int, object]:
        by_path: dict[str, Callable[[], object]] = {
            "/metrics": lambda: b'qembed_serving{dtype="\x1b[2Jfloat32"} 1\n',
            "/version": lambda: {"version": "1\x1b[31m\n2"},
        }
        return 200, by_path.get(request.path, lambda: {"object": "list", "data": [{"id": "m", "object": "model"}]})()

    with answering(answer) as url:
        description = about.about(url)
    assert description.dtype == "[2Jfloat32"
    assert description.version == "1 [31m 2"
