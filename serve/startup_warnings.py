"""What `qembed serve` warns of before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qembed.vllm import api_keys, internals, machine, sglang
from qembed.vllm.settings import LOCAL, ServerSettings


def startup_warnings(settings: ServerSettings, key_file: Path | None) -> Iterator[str]:
    """Warnings: an untried vLLM, unusual vectors, tokens that the model lacks, missing keys or encryption, SGLang's limits."""
    if settings.engine == "vllm" and (untried := internals.untried(machine.vllm_version())) is not None:
        yield untried
    if settings.checkpoint.reranker is None:
        for note in settings.checkpoint.embedder.notes(normalized=settings.normalized):
            yield f"{settings.checkpoint.folder}: {note}"
        if (cut_note := settings.checkpoint.embedder.cut_note) is not None:
            yield f"{settings.checkpoint.folder}: {cut_note}"
        if (query_note := settings.checkpoint.embedder.query_note) is not None:
            yield f"{settings.checkpoint.folder}: {query_note}"
    if (name := settings.prompt_name) is not None and settings.default_prompt is None:
        yield f"{settings.checkpoint.folder}: requests without a prompt get the model's own, {name!r} (default_prompt_name)"
    if (unknown_tokens := settings.checkpoint.vocabulary_warning) is not None:
        yield f"{settings.checkpoint.folder}: {unknown_tokens}; such texts get status 400"
    if settings.host not in LOCAL and not settings.keys:
        yield f"anyone who can reach {settings.host or 'this machine'} can use this server: no key is set (--api-key-file)"
    if settings.keys and settings.host not in LOCAL and settings.ssl_certfile is None:
        yield "keys and texts cross the network unencrypted: give --ssl-certfile, or put a proxy with TLS in front"
    if key_file is not None and (others := api_keys.readers(key_file)) is not None:
        yield f"{key_file}: {others} can read the keys in it; chmod 600 {key_file}"
    if settings.engine == "sglang":
        yield f"with SGLang {sglang.LIMITATIONS}"
