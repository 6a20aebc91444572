"""What qembed touches of vLLM beyond its documented API, outside the plugin (`qembed.serve.vllm_plugin`), and TRIED versions.

vLLM renames and moves these from release to release. `make test-vllm VERSION=…` shows whether another release still has them.
"""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from multiprocessing.context import BaseContext

TRIED = ("0.32.0",)
"""The releases with which the e2e tests of serve, plugin and embed passed; docs/serve.md has the table."""
OLDEST = (0, 26)
"""The first release that has what the plugin needs; pyproject.toml requires it. Its build for CUDA needs torch 2.11."""

# Modules. The first that exists is the one to use; the second is that of vLLM before 0.29.
SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
ARGUMENTS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
LAUNCHERS = ("vllm.entrypoints.launchers.launcher", "vllm.entrypoints.openai.api_server")
"""Where `create_server_socket` is."""
ENGINE = "vllm.v1.engine.utils"

OPTIONAL = ("--max-num-queued-reqs", "--shutdown-timeout", "--h11-max-incomplete-event-size")
"""Options that an older vLLM lacks. The server works without them, because the gate enforces the limits."""

# Lines of vLLM's log.
STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "preparing the weights"),
    ("KV cache size", "setting up the cache"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("Starting vLLM server", "opening the port"),
    ("Application startup complete", "answering a first text"),
)
"""Markers, and the stage of the start that begins with them."""
PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:(?:INFO|WARNING|ERROR|CRITICAL|DEBUG) [\d-]+ [\d:]+ \[[^\]]*\]\s?)?")
PROCESS = re.compile(r"^\([^)]*pid=\d+\) ?")
"""What releases before 0.31 put before each line of a process, also before qembed's own."""
CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed", "Engine core proc", "EngineDeadError")
"""What parent processes log after a child has failed."""
WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")
GRAPHS = re.compile(r"Graph capturing finished in .*took (-?[\d.]+) GiB")


def untried(version: str | None) -> str | None:
    """A warning if vLLM's `version` is too old or was never tried; otherwise None. A local part (+cu130) is ignored."""
    if version is None or version.partition("+")[0] in TRIED:
        return None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return (
            f"vLLM {version} is too old for this qembed, which needs {'.'.join(map(str, OLDEST))}; install {', '.join(TRIED)}"
        )
    return f"vLLM {version} was never tried with this qembed, only {', '.join(TRIED)}; if it fails, install one of these"


def first_module(names: Sequence[str]) -> str | None:
    """The first of `names` that is an installed module; None if none is. Imports packages, but none of the modules."""
    for name in names:
        with suppress(ModuleNotFoundError):
            if find_spec(name) is not None:
                return name
    return None


def server_options() -> set[str] | None:
    """All options of the installed vLLM's server; None if its parser is not at a known place."""
    if (module := first_module(ARGUMENTS)) is None:
        return None
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = importlib.import_module(module).make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    return set(parser._option_string_actions)


def use_socket(create: Callable[..., socket.socket]) -> None:
    """Let vLLM's server listen on the socket that `create` returns."""
    importlib.import_module(first_module(LAUNCHERS) or LAUNCHERS[-1]).create_server_socket = create  # type: ignore[attr-defined]


def run_server() -> None:
    """Run vLLM's server with the arguments in sys.argv, until it ends."""
    if first_module(SERVERS[:1]) is not None:
        runpy.run_module(SERVERS[0], run_name="__main__")
        return
    # As __main__ this module would have functions of its own, which do not see the socket of `use_socket`.
    server = importlib.import_module(SERVERS[-1])
    server.cli_env_setup()
    arguments = server.make_arg_parser(server.FlexibleArgumentParser()).parse_args()
    server.validate_parsed_serve_args(arguments)
    server.uvloop.run(server.run_server(arguments))


def use_context(context: Callable[[], BaseContext]) -> None:
    """Let vLLM start its engine in the multiprocessing context that `context` returns."""
    importlib.import_module(ENGINE).get_mp_context = context  # type: ignore[attr-defined]


def has_dead_engine(app: object) -> bool:
    """Whether vLLM's `app` knows that its engine has died."""
    return bool(getattr(getattr(getattr(app, "state", None), "engine_client", None), "errored", False))


def load(arguments: Sequence[str]) -> Any:
    """An `LLM` in this process, from arguments of the command line."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    return LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(list(arguments))))


def abort_unfinished(llm: Any) -> None:
    """Drop the texts that `llm` has not finished: its next call would compute them too."""
    llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)


def shut_down(llm: Any) -> None:
    """End the engine of `llm`."""
    llm.llm_engine.engine_core.shutdown()
