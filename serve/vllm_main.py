"""The process that vLLM runs in: `python -m qembed.serve.vllm_main` with the arguments of vLLM's OpenAI server.

vLLM's console script fails with its CPU build, and the module that used to be run instead is deprecated. This one also sees
to it that vLLM does not outlive whoever started it: its standard input is a pipe whose other end closes when they die.
"""

from __future__ import annotations

import os
import runpy
import signal
import stat
import threading
import time
from importlib.util import find_spec

from qembed.serve import machine

GRACE = 20.0
BEFORE_0_32 = "vllm.entrypoints.openai.api_server"


def main() -> None:
    """Run vLLM's server until it ends, or until standard input does."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    module = "vllm.entrypoints.launchers.api_server.entry"
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    runpy.run_module(module if found else BEFORE_0_32, run_name="__main__")


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    shared = machine.shared_memory(os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    if os.getpgid(0) == os.getpid():  # engine.py starts us as the leader of a group: this ends vLLM's other processes too
        for path in shared:
            path.unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
