"""The process that vLLM runs in: `python -m qembed.serve.server_process` with the arguments of vLLM's OpenAI server.

vLLM's console script fails in its CPU build, and `vllm.entrypoints.openai.api_server` is deprecated.

Standard input is a pipe from the parent, with lines: first the rules of the gate (`qembed.vllm.gate_rules`), which are not
arguments because they hold hashes of keys; later KEYS with other keys, or DRAIN and a number of seconds, to stop the server.
When the parent dies the pipe closes, and this process ends. A command from `qembed serve --print-command` has the rules in its
environment instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

from qembed.serve.gate import gate
from qembed.vllm import arguments, gate_rules, internals, machine, unused_modules

# With httptools uvicorn drops the body of a POST that asks for an upgrade (Java's HttpClient sends `Upgrade: h2c` by default).
# Without it uvicorn uses h11, and the request is answered as HTTP/1.1. Without a websocket library it does not take a POST with
# `Upgrade: websocket` for a handshake; no route is a websocket.
UPGRADE_MODULES = ("httptools", "websockets", "wsproto")
# Whether the engine is forked (`qembed.vllm.arguments.server_environment`), as on a CPU.
FORKS_ENGINE = arguments.FORKED_THREADS in os.environ
# Not in main(), because vLLM's other processes start by importing their parent's main module.
if __name__ in ("__main__", "__mp_main__"):
    unused_modules.hide((*UPGRADE_MODULES, *unused_modules.names(sys.argv, on_cpu=FORKS_ENGINE)))
    gc.disable()  # until all is imported: a fifth of the time of the imports

GRACE = 20.0  # seconds
PR_SET_PDEATHSIG = 1  # of prctl(2)
POLL = 0.05  # seconds


def main() -> None:
    """Run vLLM's server until it ends or standard input closes."""
    variable = os.environ.pop(gate_rules.VARIABLE, None)
    if variable is not None:
        gate.RULES = gate_rules.load(variable.encode())
    elif stat.S_ISFIFO(os.fstat(0).st_mode):
        reader = os.fdopen(os.dup(0), "rb", buffering=0)
        gate.RULES = gate_rules.load(reader.readline())
        threading.Thread(target=_follow_parent, args=(reader,), name="parent", daemon=True).start()
    else:
        sys.exit(f"server_process: {gate_rules.VARIABLE} is not set; see `qembed serve --print-command`")
    if find_spec("uvicorn") is not None:
        from qembed.serve import connections

        connections.install(gate.RULES.max_connections, gate.RULES.client_timeout)
    options = internals.server_options()
    gc.freeze()
    gc.enable()
    if options is not None:
        _check_names(gate.RULES.engine_args, options)
        _drop_unsupported(options)
    if gate.RULES.listener is not None:
        _use_socket(gate.RULES.listener)
    if FORKS_ENGINE and internals.first_module([internals.ENGINE]):
        _fork_engine()
    internals.run_server()


def _follow_parent(reader: object) -> None:
    """Drain or replace the keys when the parent says so, and end when it does."""
    while line := reader.readline():  # type: ignore[attr-defined]
        if line.startswith(gate_rules.KEYS):
            _replace_keys(line)
        if line.startswith(gate_rules.DRAIN):
            _drain(float(line.split()[1]))
            os.kill(os.getpid(), signal.SIGTERM)
    shared = machine.shared_memory(os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    if os.getpgid(0) == os.getpid():  # supervisor.py made this process a group leader: vLLM's other processes end too
        for path in shared:
            path.unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)


def _drain(seconds: float) -> None:
    """Admit no more requests, and wait up to `seconds` until all admitted ones are answered.

    Without this, vLLM would answer 500 to the requests that it is computing when it stops.
    """
    deadline = time.monotonic() + seconds
    for load in [guard.load for guard in gate.GATES]:
        load.draining = True
        while load.requests and time.monotonic() < deadline:
            time.sleep(POLL)
    time.sleep(2 * POLL)  # for the last answer to be sent


def _replace_keys(line: bytes) -> None:
    """Replace the API keys: of the gate, or of the one that vLLM is about to create."""
    keys = json.loads(line.partition(b" ")[2])
    assert gate.RULES is not None
    gate.RULES = replace(gate.RULES, keys=keys)
    for guard in gate.GATES:
        guard.keys = keys


def _use_socket(number: int) -> None:
    """Let vLLM listen on the socket with this file descriptor, which the parent has opened and keeps."""
    internals.use_socket(lambda *_, **__: socket.socket(fileno=number))


def _fork_engine() -> None:
    """Let vLLM fork its engine from this process, which has imported torch and vLLM, instead of starting another Python.

    vLLM starts it anew on CPUs because a fork of a process whose OpenMP has computed hangs. This one never has.
    """
    import multiprocessing

    def freeze() -> None:
        gc.collect()
        gc.freeze()  # so that the collector does not write to, and so copy, the pages that both processes share

    os.register_at_fork(before=freeze, after_in_child=_end_with_parent)
    internals.use_context(lambda: multiprocessing.get_context("fork"))


def _end_with_parent() -> None:
    """Let the system end this process when its parent ends, however that happens."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _check_names(names: list[str], options: set[str]) -> None:
    """Check that vLLM has these settings by their full names; its parser would also accept abbreviations."""
    unknown = [name for name in names if f"--{name.split('.')[0].rstrip('+')}" not in options]
    if unknown:
        print(f"ValueError: --engine-arg: this vLLM has no setting {', '.join(unknown)}", file=sys.stderr, flush=True)
        sys.exit(2)


def _drop_unsupported(options: set[str]) -> None:
    """Remove the options in `internals.OPTIONAL` that this vLLM lacks, with their values, from sys.argv."""
    for option in internals.OPTIONAL:
        if option not in options and option in sys.argv:
            index = sys.argv.index(option)
            del sys.argv[index : index + 2]


if __name__ == "__mp_main__":  # an engine or worker that vLLM started anew
    _end_with_parent()
if __name__ == "__main__":
    main()
