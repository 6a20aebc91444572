"""`--engine-arg KEY=VALUE`: any other setting of vLLM, checked against what the installed one knows before it is started."""

from __future__ import annotations

from qembed.errors import BadInput

# What qembed itself has an option for, or what would undo what it promises.
OURS = {
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
NEVER = {
    "trust-remote-code": "code from a checkpoint is never run",
    "load-format": "only safetensors are read",
    "runner": "this is an embedding server",
    "convert": "this is an embedding server",
    "middleware": "qembed's own checks are there",
    "uds": "use --host and --port",
    "api-server-count": "limits are counted in one process",
    "headless": "this is a server",
    "config": "give its settings one by one",
    "hf-overrides": "qembed sets it itself",
}


def parse(text: str) -> tuple[str, str]:
    """The name, with dashes, and the value of "KEY=VALUE"; a bare KEY is a switch that is on.

    Raises:
        BadInput: there is no KEY, or it is not to be set in this way.
    """
    key, _, value = text.partition("=")
    name = key.strip().lstrip("-").replace("_", "-")
    if not name:
        raise BadInput(f"--engine-arg {text!r}: write KEY=VALUE")
    bare = name.split(".")[0].rstrip("+").removeprefix("no-")
    if (ours := OURS.get(bare)) is not None:
        raise BadInput(f"--engine-arg {name}: use {ours}")
    if (why := NEVER.get(bare)) is not None:
        raise BadInput(f"--engine-arg {name}: not allowed: {why}")
    return name, value if "=" in text else "true"


def option(name: str, value: str) -> list[str]:
    """The same as vLLM's command line has it. "true" and "false" are switches, and so is nothing."""
    if value.lower() in ("true", "false"):
        return [f"--{name}"] if value.lower() == "true" else [f"--no-{name}"]
    return [f"--{name}", value]
