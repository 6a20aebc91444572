"""What vLLM imports on a GPU machine, tried without a GPU: `bench/gpu.sh imports SITE` (docs/benchmarks.md).

A package that is neither in the wheels nor on that machine shows up here, instead of in the minutes on the machine. The trial
needs an environment as that machine has it: Python 3.12 with torch 2.11, transformers 5.17, what these need, and nothing else.
SITE is the folder with the wheels installed, `build/gpu/site` in the folder of `gpu.sh rehearse`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CAPABILITY = (9, 0)
"""Of the stand-in for the card."""
MODULES = (
    "vllm.platforms.cuda",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.openai.cli_args",
    "vllm.entrypoints.pooling.embed.serving",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.layers.pooler",
    "vllm.model_executor.layers.quantization.auto_awq",
    "vllm.compilation.backends",
    "vllm.compilation.cuda_graph",
    "qembed.serve.server_process",
    "qembed.serve.gate",
    "qembed.serve.vllm_plugin.gpu_worker",
    "qembed.serve.vllm_plugin.scheduler",
    "qembed.serve.vllm_plugin.int8_table",
    "qembed.quantize.cli",
    "pytest",
)
"""In the order in which the pieces of gpu.py need them: vLLM's server, engine, worker and model; qembed; its tests."""
DRIVER = """
cuCtxGetCurrent cuCtxSetCurrent cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuGetErrorString cuGetProcAddress_v2
cuMemAddressFree cuMemAddressReserve cuMemCreate cuMemGetAllocationGranularity cuMemMap cuMemRelease cuMemSetAccess cuMemUnmap
cuPointerGetAttribute cuTensorMapEncodeTiled
"""
"""Functions of the NVIDIA driver that vLLM's libraries are linked with."""


def write_driver(folder: Path) -> None:
    """Compile a `libcuda.so.1` whose functions all fail into `folder`: enough to load what is linked with the driver."""
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER.split()))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)


def extra_packages(folders: Sequence[str]) -> list[str]:
    """Packages in `folders` that neither torch nor transformers needs, by what they declare, other than pip."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    distributions = importlib.metadata.distributions(path=list(folders))
    installed = {str(canonicalize_name(item.metadata["Name"])): item for item in distributions}
    needed, todo = {"pip"}, [("torch", ""), ("transformers", "")]
    reached = set(todo)
    while todo:
        name, extra = todo.pop()
        needed.add(name)
        for requirement in map(Requirement, installed[name].requires or [] if name in installed else []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                following = {(str(canonicalize_name(requirement.name)), wanted) for wanted in ("", *requirement.extras)}
                todo += following - reached
                reached |= following
    return sorted(set(installed) - needed)


def stand_in() -> None:
    """Let vLLM take this machine for one with a card of CAPABILITY."""
    platforms: Any = importlib.import_module("vllm.platforms")
    platforms.resolve_current_platform_cls_qualname = lambda: "vllm.platforms.cuda.NonNvmlCudaPlatform"
    card: Any = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform
    capability = importlib.import_module("vllm.platforms.interface").DeviceCapability(*CAPABILITY)
    card.get_device_capability = lambda *_, **__: capability
    card.get_device_name = lambda *_, **__: "a card"
    card.get_device_total_memory = lambda *_, **__: 80 * 2**30


def failures(modules: Sequence[str]) -> dict[str, str]:
    """The modules of `modules` that cannot be imported, each with its error; for a missing module its name."""
    errors = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            errors[name] = error.name or str(error)
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def trial(site: Path, python: str) -> dict[str, Any]:
    """Import MODULES in a process of `python` with `site`: its extra packages, and the failures.

    Raises:
        subprocess.CalledProcessError: the trial itself failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_driver(folder)
        path = os.pathsep.join(map(str, (ROOT, site.resolve())))
        variables = {"PYTHONPATH": path, "LD_LIBRARY_PATH": name, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        answers = folder / "answers.json"
        command = [python, str(Path(__file__)), "--here", str(answers)]
        subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(answers.read_text())
        return result


def here(answers: Path) -> None:
    """Run the trial in this process, and write what it gave to `answers`."""
    # Not the folders of PYTHONPATH: these have the wheels.
    extra, errors = extra_packages([path for path in sys.path if path.startswith(sys.prefix)]), {}
    try:
        stand_in()
    except ModuleNotFoundError as error:
        errors["vllm.platforms"] = error.name or str(error)
    answers.write_text(json.dumps({"extra": extra, "failures": errors or failures(MODULES)}))


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 if an import fails, or if the environment has more than the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", nargs="?", type=Path, help="folder with vLLM's wheels installed")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environment [default: this one]")
    parser.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        here(options.here)
        return 0
    if options.site is None or not options.site.is_dir():
        parser.error("name the folder with the wheels installed")
    if shutil.which("cc") is None:
        parser.error("needs a C compiler, for a stand-in of the driver")
    result = trial(options.site, options.python)
    if result["extra"]:
        print(f"the environment has more than torch and transformers need: {', '.join(result['extra'])}")
    for name, error in result["failures"].items():
        print(f"{name}: {error}")
    print(f"{len(MODULES) - len(result['failures'])} of {len(MODULES)} modules imported")
    return int(bool(result["failures"] or result["extra"]))


if __name__ == "__main__":
    raise SystemExit(main())
