"""The rules of the gate (`qembed.serve.gate`). They go to the server process through a pipe, because of the keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

VARIABLE = "QEMBED_GATE"
DRAIN = b"drain"
"""First word of the line that tells the server process to finish its requests. A number of seconds follows."""
KEYS = b"keys"
"""First word of the line with other API keys: a JSON object as `Rules.keys`."""
ACCESS = "qembed-access "
"""First word of a log line about a request."""
TEXTS = "qembed-texts "
"""First word of a log line with a request's texts."""
LONG_TEXTS = ("refuse", "truncate", "chunk")
"""Status 400; cut at the end; or in parts, of whose vectors the mean is the text's."""
NONFINITE = "holds NaN or infinity"
"""Part of the message of status 500 for a vector or a score that is not finite."""


@dataclass(frozen=True)
class Rules:
    """The rules of one server.

    Attributes:
        folder: the checkpoint's folder, for its tokenizer.
        max_model_len: maximum tokens of a text.
        dimensions: the vector lengths that a request may ask for; the largest is the whole vector's.
        smallest: any length from this to the largest of `dimensions` may be asked for too; None: only those listed.
        prompts: prompts by name; a prompt is prepended to a text.
        default_prompt: the name of the prompt for requests without one; None: no prompt.
        model_prompt: the name of the prompt that the model itself has for texts without one; None: no prompt.
        prompt_models: the name of the prompt for requests to each further name of the model.
        lower_case: whether texts are lower-cased.
        normalized: whether vectors have unit length.
        instruction: a reranker's task for requests without one; None: an embedder is served.
        max_batch: maximum texts of a request.
        max_body: maximum bytes of a request.
        max_queue: maximum texts waiting or being computed.
        max_connections: maximum open connections.
        client_timeout: seconds that a client may take to send a header or a body, or to take 64 KiB of an answer.
        clean: whether texts are cleaned.
        long_texts: what becomes of texts that are too long, one of LONG_TEXTS, unless the request says otherwise.
        allow_token_ids: whether token ids are accepted.
        table_rows: rows of the token table; token ids are below it.
        checks_ids: whether the tokenizer has ids beyond the table, so that each text's ids are checked.
        hosts: the names by which requests may call the server (`hosts`); None: any.
        keys: the name of each API key ("": unnamed; None: qembed's own) by its SHA-256 in hexadecimal; empty: none is required.
        plan: planned bytes by name, for /metrics.
        parts: the number of devices; `plan` is for one of them.
        restarts: the number of restarts so far, for /metrics.
        restart_seconds: about the time that a restart takes.
        about: labels of qembed_serving in /metrics: "dtype" (of the computation), "device", "weights", "kernel".
        suspects: the file descriptor of the table of texts in flight (`qembed.serve.gate.suspects`); None: in memory.
        listener: the file descriptor of a listening socket to use; None: vLLM opens one.
        access_log: whether each request is written to standard output, without texts.
        log_texts: whether the texts of each request are written to standard output.
        engine_args: names of vLLM settings from the user, to be checked against those vLLM has.
    """

    folder: str
    max_model_len: int
    dimensions: list[int]
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    model_prompt: str | None = None
    prompt_models: dict[str, str] = field(default_factory=dict)
    lower_case: bool = False
    normalized: bool = True
    instruction: str | None = None
    smallest: int | None = None
    max_batch: int = 2048
    max_body: int = 32 * 2**20
    max_queue: int = 4096
    max_connections: int = 1024
    client_timeout: float = 30.0
    clean: bool = True
    long_texts: str = "refuse"
    allow_token_ids: bool = False
    table_rows: int = 2**31
    checks_ids: bool = False
    hosts: list[str] | None = None
    keys: dict[str, str | None] = field(default_factory=dict, repr=False)
    plan: dict[str, int] = field(default_factory=dict)
    parts: int = 1
    restarts: int = 0
    restart_seconds: int = 30
    about: dict[str, str] = field(default_factory=dict)
    listener: int | None = None
    suspects: int | None = None
    access_log: bool = False
    log_texts: bool = False
    engine_args: list[str] = field(default_factory=list)

    def allows(self, dimensions: int) -> bool:
        """Whether a request may ask for vectors of this length."""
        return dimensions in self.dimensions or (
            self.smallest is not None and self.smallest <= dimensions <= max(self.dimensions)
        )

    @property
    def sizes(self) -> str:
        """The vector lengths that a request may ask for, in words."""
        listed = ", ".join(map(str, self.dimensions))
        return listed if self.smallest is None else f"{self.smallest} to {max(self.dimensions)}"

    def dump(self) -> bytes:
        """The rules as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


def load(line: bytes) -> Rules:
    """The rules that `Rules.dump` wrote."""
    known = {field.name for field in fields(Rules)}
    return Rules(**{name: value for name, value in json.loads(line).items() if name in known})
