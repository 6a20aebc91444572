"""What the gate lets in: fixed before the server starts, and sent to its process through a pipe, because of the keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

VARIABLE = "QEMBED_GATE"
DRAIN = b"drain"
"""First word of the line that tells the server process to let requests finish, followed by a number of seconds."""
TEXTS = "qembed-texts "
"""First word of a line of the server's log that holds a request's texts."""


@dataclass(frozen=True)
class Rules:
    """The rules of one server.

    Attributes:
        folder: the checkpoint's folder, for its tokenizer.
        max_model_len: tokens of a text, at most.
        dimensions: the lengths that a request may ask for.
        prompts: texts that go before a text, by name.
        default_prompt: the name of the prompt where a request names none; None: none.
        max_batch: texts of a request, at most.
        max_body: bytes of a request, at most.
        max_queue: texts in the server, at most.
        clean: whether texts are cleaned.
        truncate: whether what is too long is cut where the request does not say.
        allow_token_ids: whether token ids are taken.
        keys: SHA-256 of each key, as hexadecimal digits; empty: no key is asked for.
        plan: planned bytes by name, for /metrics.
        parts: devices that share the work, for each of which the plan is.
        restarts: how often the server has been started again.
        about: what is served, for /metrics: "dtype" (computed in), "device", "weights".
        listener: the number of a listening socket to be used in place of a new one; None: a new one.
        log_texts: whether each request is written to standard output, with its texts.
        engine_args: names of vLLM settings that the user gave, to be checked against what vLLM has.
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
        """One line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


def load(line: bytes) -> Rules:
    """The rules that `Rules.dump` wrote."""
    known = {one.name for one in fields(Rules)}
    return Rules(**{name: value for name, value in json.loads(line).items() if name in known})
