"""qembed's own clients write prompts before the texts themselves, so a server must not add its own."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from qembed.client import embeddings
from qembed.client.about import as_it_is
from qembed.errors import QembedError
from tests.answering import Request, Server

QEMBED = {"version": "0.32", "qembed": "1.0", "default_prompt": "query"}


class Recording(Server):
    """A server whose /version is `version`, None for 404; `bodies` are the requests for vectors."""

    def __init__(self, version: Any) -> None:
        self.version = version
        self.bodies: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = [{"id": "m", "object": "model"}]
        super().__init__(self.answer)

    def answer(self, request: Request) -> tuple[int, object]:
        if request.path == "/version":
            return (404, {}) if self.version is None else (200, self.version)
        if not request.body:
            return 200, {"object": "list", "data": self.models}
        self.bodies.append(request.body)
        vector = base64.b64encode(np.ones(2, "<f4").tobytes()).decode()
        data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(len(request.body["input"]))]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (QEMBED, {"prompt_name": ""}),
        ({**QEMBED, "default_prompt": None}, {}),
        ({"version": "0.32"}, {}),
        ({"default_prompt": "query"}, {}),
        ([], {}),
        (b"no json", {}),
        (None, {}),
    ],
)
def test_only_a_qembed_server_with_a_default_prompt_is_asked_for_none(version: Any, fields: dict[str, str]) -> None:
    server = Recording(version)
    try:
        assert as_it_is(server.url) == fields
        embeddings.embed(["a", "b"], url=server.url)
        assert [set(body) - {"input", "model", "encoding_format"} for body in server.bodies] == [set(fields)]
    finally:
        server.end()


@pytest.mark.parametrize(("roots", "count"), [(["/checkpoint"] * 3, 3), (["/checkpoint", "/other", None], 3)])
def test_further_names_of_one_checkpoint_are_not_taken_for_other_models(roots: list[str | None], count: int) -> None:
    server = Recording(QEMBED)
    listed = [{"id": f"m{index}", "object": "model", "root": root} for index, root in enumerate(roots)]
    server.models = listed
    try:
        if len(set(roots)) == 1:
            embeddings.embed(["a"], url=server.url)
            assert [(body["model"], body["prompt_name"]) for body in server.bodies] == [("m0", "")]
        else:
            with pytest.raises(QembedError, match=f"{count} models"):
                embeddings.embed(["a"], url=server.url)
    finally:
        server.end()
