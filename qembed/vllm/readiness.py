"""Whether a server that starts is ready: it answers, and its first answer is a vector, or a reranker's score."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING

from qembed.vllm import float16, gate_rules, log
from qembed.vllm.internals import STAGES

if TYPE_CHECKING:
    from qembed.vllm.supervisor import Server

FIRST_TEXT = "hello"


def wait(server: Server, report: Callable[[str], None], deadline: float, poll: float) -> None:
    """Wait until vLLM's /health answers 200, looking every `poll` seconds. `report` gets the stages of its start.

    Raises:
        QembedError: it died, or did not answer by `deadline` (of time.monotonic).
    """
    while not _healthy(server):
        if server.process.poll() is not None:
            raise server.failure("vLLM did not start")
        if time.monotonic() > deadline:
            raise server.failure(f"vLLM did not answer within {server.launch.settings.startup_timeout:g} s (--startup-timeout)")
        for line in server.read_log():
            stage = log.stage(line)
            if stage:
                report(stage)
        time.sleep(poll)
    report(STAGES[-1][1])


def _healthy(server: Server) -> bool:
    try:
        return server.request("GET", "/health", None, 5.0)[0] == 200
    except (OSError, HTTPException):
        return False


def check_first_answers(server: Server, timeout: float) -> None:
    """Check that the server answers a text with a finite vector of the model's length, or a pair with a score.

    In float16 also texts that are known to exceed its range in a published model.

    Raises:
        QembedError: it does not.
        BadInput: a number is not finite in float16.
    """
    launch = server.launch
    for text in (FIRST_TEXT, *(float16.TEXTS if launch.dtype == "float16" else ())):
        if not _is_finite(server, text, timeout):
            if launch.dtype == "float16":
                reason = f"the text {text!r} gave NaN or infinity"
                raise float16.refusal(launch.settings.checkpoint, reason, launch.target)
            raise server.failure("vLLM's first answer holds NaN or infinity")


def _is_finite(server: Server, text: str, timeout: float) -> bool:
    """Whether the numbers of the answer for `text` are finite.

    Raises:
        QembedError: there is no such answer.
    """
    settings = server.launch.settings
    reranks = settings.checkpoint.reranker is not None
    texts = {"text_1": text, "text_2": text} if reranks else {"input": text}
    if settings.engine == "vllm" and not reranks:
        texts["prompt_name"] = ""
    body = json.dumps({"model": server.model, **texts})
    try:
        status, answer = server.request("POST", "/v1/score" if reranks else "/v1/embeddings", body, timeout)
        if status == 500 and gate_rules.NONFINITE.encode() in answer:
            return False
        if status == 200:
            result = json.loads(answer)["data"][0]
            numbers = [result["score"]] if reranks else result["embedding"]
            if len(numbers) == (1 if reranks else server.launch.width):
                return all(map(math.isfinite, numbers))
            raise server.failure(f"vLLM's first answer is not a {'score' if reranks else 'vector'}")
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise server.failure("vLLM failed at the first text") from error
    raise server.failure(f"vLLM failed at the first text (HTTP status {status})")
