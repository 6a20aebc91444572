"""The process that vLLM runs in: `python -m qembed.serve.server_process` with the arguments of vLLM's OpenAI server.

vLLM's console script fails in its CPU build, and `vllm.entrypoints.openai.api_server` is deprecated. This process also ends
when its parent dies: its standard input is a pipe whose other end then closes. Through that pipe come two lines: first the
rules of the gate (`qembed.vllm.gate_rules`), which hold hashes of keys and so are no arguments; later DRAIN and a number of
seconds, when the server is to stop. A command from `qembed serve --print-command` has the rules in its environment instead.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import stat
import sys
import threading
import time
from importlib.util import find_spec

from qembed.serve import gate
from qembed.vllm import gate_rules, machine

# transformers imports these where they are installed (for qembed eval they are), and an embedding server never needs them: in
# each of vLLM's processes they are 90 MB and half of the time of its imports. To Python a module that is None is not there.
# It stands here and not in main() because vLLM's processes begin by importing their parent's main module.
UNUSED = ("pandas", "scipy", "sklearn")
# With httptools uvicorn drops the body of a POST that asks for an upgrade (Java's HttpClient sends `Upgrade: h2c` by default);
# with h11, which it takes otherwise, the request is answered as HTTP/1.1. Without a library for websockets it does not take a
# POST with `Upgrade: websocket` for a handshake; no route is a websocket.
UPGRADES = ("httptools", "websockets", "wsproto")
if __name__ in ("__main__", "__mp_main__"):
    for module in (*UNUSED, *UPGRADES):
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]

GRACE = 20.0
BEFORE_0_32 = "vllm.entrypoints.openai.api_server"
POLL = 0.05
# Settings of ours that an older vLLM lacks, and can do without: the gate counts by itself.
OPTIONAL = ("--max-num-queued-reqs", "--shutdown-timeout")


def main() -> None:
    """Run vLLM's server until it ends, or until standard input does."""
    given = os.environ.pop(gate_rules.VARIABLE, None)
    piped = stat.S_ISFIFO(os.fstat(0).st_mode)
    if given is not None:
        gate.RULES = gate_rules.load(given.encode())
    elif piped:
        reader = os.fdopen(os.dup(0), "rb", buffering=0)
        gate.RULES = gate_rules.load(reader.readline())
        threading.Thread(target=_obey, args=(reader,), name="parent", daemon=True).start()
    else:
        sys.exit(f"server_process: started by hand it needs {gate_rules.VARIABLE}; `qembed serve --print-command` prints it")
    known = _options()
    _check_names(gate.RULES.engine_args, known)
    _leave_out(known)
    if gate.RULES.listener is not None:
        _use_socket(gate.RULES.listener)
    module = "vllm.entrypoints.launchers.api_server.entry"
    runpy.run_module(module if _exists(module) else BEFORE_0_32, run_name="__main__")


def _obey(reader: object) -> None:
    """Do what the parent says, and end when it does."""
    while line := reader.readline():  # type: ignore[attr-defined]
        if line.startswith(gate_rules.DRAIN):
            _drain(float(line.split()[1]))
            os.kill(os.getpid(), signal.SIGTERM)
    shared = machine.shared_memory(os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    if os.getpgid(0) == os.getpid():  # engine.py starts us as the leader of a group: this ends vLLM's other processes too
        for path in shared:
            path.unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)


def _drain(seconds: float) -> None:
    """Let nothing more in, and wait until all that is in has been answered, but no longer than `seconds`.

    vLLM, told to end, answers 500 to what it is still computing.
    """
    deadline = time.monotonic() + seconds
    for load in gate.LOAD:
        load.draining = True
        while load.requests and time.monotonic() < deadline:
            time.sleep(POLL)
    time.sleep(2 * POLL)  # the last answer is on its way


def _use_socket(number: int) -> None:
    """Let vLLM listen on the socket with this number, which the parent has bound and keeps."""
    from vllm.entrypoints.launchers import launcher

    launcher.create_server_socket = lambda *_, **__: socket.socket(fileno=number)


def _options() -> set[str] | None:
    """Every option of the installed vLLM's server; None if it cannot be asked."""
    import importlib

    for module in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        if _exists(module):
            from vllm.utils.argparse_utils import FlexibleArgumentParser

            parser = importlib.import_module(module).make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
            return set(parser._option_string_actions)
    return None


def _check_names(names: list[str], known: set[str] | None) -> None:
    """See that vLLM has these settings by these names: its parser takes beginnings of names too."""
    unknown = [name for name in names if known is not None and f"--{name.split('.')[0].rstrip('+')}" not in known]
    if unknown:
        print(f"ValueError: --engine-arg: this vLLM has no setting {', '.join(unknown)}", file=sys.stderr, flush=True)
        sys.exit(2)


def _leave_out(known: set[str] | None) -> None:
    for option in OPTIONAL:
        if known is not None and option not in known and option in sys.argv:
            at = sys.argv.index(option)
            del sys.argv[at : at + 2]


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
