"""The rules of the gate (`qembed.serve.gate`). They go to the server process through a pipe, because of the keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

VARIABLE = "QEMBED_GATE"
DRAIN = b"drain"
"""First word of the line that tells the server process to finish its requests. A number of seconds follows."""
TEXTS = "qembed-texts "
"""First word of a log line with a request's texts."""


@dataclass(frozen=True)
class Rules:
    """The rules of one server.

    Attributes:
        folder: the checkpoint's folder, for its tokenizer.
        max_model_len: maximum tokens of a text.
        dimensions: the vector lengths that a request may ask for.
        prompts: prompts by name; a prompt is prepended to a text.
        default_prompt: the name of the prompt for requests without one; None: no prompt.
        max_batch: maximum texts of a request.
        max_body: maximum bytes of a request.
        max_queue: maximum texts waiting or being computed.
        clean: whether texts are cleaned.
        truncate: whether texts that are too long are truncated, unless the request says otherwise.
        allow_token_ids: whether token ids are accepted.
        keys: SHA-256 of each API key in hexadecimal; empty: no key is required.
        plan: planned bytes by name, for /metrics.
        parts: the number of devices; `plan` is for one of them.
        restarts: the number of restarts so far, for /metrics.
        about: labels of qembed_serving in /metrics: "dtype" (of the computation), "device", "weights", "kernel".
        listener: the file descriptor of a listening socket to use; None: vLLM opens one.
        log_texts: whether the texts of each request are written to standard output.
        engine_args: names of vLLM settings from the user, to be checked against those vLLM has.
    """

    folder: str
    max_model_len: int
    dimensions: list[int]
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_batch: int = 2048
    max_body: int = 32 * 2**20
    max_queue: int = 4096
    clean: bool = True
    truncate: bool = False
    allow_token_ids: bool = False
    keys: list[str] = field(default_factory=list, repr=False)
    plan: dict[str, int] = field(default_factory=dict)
    parts: int = 1
    restarts: int = 0
    about: dict[str, str] = field(default_factory=dict)
    listener: int | None = None
    log_texts: bool = False
    engine_args: list[str] = field(default_factory=list)

    def dump(self) -> bytes:
        """The rules as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


def load(line: bytes) -> Rules:
    """The rules that `Rules.dump` wrote."""
    known = {field.name for field in fields(Rules)}
    return Rules(**{name: value for name, value in json.loads(line).items() if name in known})
