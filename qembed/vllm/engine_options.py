"""`--engine-arg KEY=VALUE`: any other setting of the engine, except those that qembed sets itself."""

from __future__ import annotations

from qembed.errors import BadInput

QEMBED_OPTIONS = {
    "model": "--model",
    "host": "--host",
    "port": "--port",
    "served-model-name": "--served-model-name",
    "dtype": "--dtype",
    "max-model-len": "--max-model-len",
    "max-num-seqs": "--max-num-seqs",
    "max-num-batched-tokens": "--max-num-batched-tokens",
    "kv-cache-memory-bytes": "--memory",
    "gpu-memory-utilization": "--memory",
    "kv-cache-dtype": "--kv-cache-dtype",
    "max-num-queued-reqs": "--max-queue",
    "shutdown-timeout": "--shutdown-timeout",
    "api-key": "--api-key-file",
    "tensor-parallel-size": "--tensor-parallel-size",
    "data-parallel-size": "--data-parallel-size",
    "ssl-certfile": "--ssl-certfile",
    "ssl-keyfile": "--ssl-keyfile",
}
"""Settings of vLLM, and the option of qembed to use instead."""
FORBIDDEN = {
    "trust-remote-code": "code from a checkpoint is never run",
    "load-format": "only safetensors are read",
    "runner": "this is an embedding server",
    "convert": "this is an embedding server",
    "middleware": "qembed's gate is the middleware",
    "uds": "use --host and --port",
    "api-server-count": "limits are counted in one process",
    "headless": "this is a server",
    "config": "give its settings one by one",
    "hf-overrides": "qembed sets it itself",
    "pooler-config": "the checkpoint says how vectors are made",
    "override-pooler-config": "the checkpoint says how vectors are made",
}
"""Settings of vLLM that may not be set, and why."""


def parse(text: str) -> tuple[str, str]:
    """The name, with dashes, and the value of "KEY=VALUE". A bare KEY is a switch with the value "true".

    Raises:
        BadInput: KEY is missing, or may not be set.
    """
    key, _, value = text.partition("=")
    name = key.strip().lstrip("-").replace("_", "-")
    if not name:
        raise BadInput(f"--engine-arg {text!r}: write KEY=VALUE")
    setting = name.split(".")[0].rstrip("+").removeprefix("no-")
    if (own_option := QEMBED_OPTIONS.get(setting)) is not None:
        raise BadInput(f"--engine-arg {name}: use {own_option}")
    if (reason := FORBIDDEN.get(setting)) is not None:
        raise BadInput(f"--engine-arg {name}: not allowed: {reason}")
    return name, value if "=" in text else "true"


def option(name: str, value: str) -> list[str]:
    """The setting as words of vLLM's command line. The values "true" and "false" become switches."""
    if value.lower() in ("true", "false"):
        return [f"--{name}"] if value.lower() == "true" else [f"--no-{name}"]
    return [f"--{name}", value]
