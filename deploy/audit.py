"""Known vulnerabilities of what is in the images, by pip-audit: `python deploy/audit.py cpu gpu router`   (`make audit`).

pip-audit also reports "No known vulnerabilities found" if it could look nothing up, as without a network; here that is a
warning. Exit codes: 0 none found, or none could be looked up; 1 some found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LISTS = Path(__file__).parent / "requirements"


def pins(target: str) -> list[tuple[str, str]]:
    """Name and version of each package of an image; torch's 2.13.0+cpu is the 2.13.0 that advisories name."""
    lines = (LISTS / f"image-{target}.txt").read_text(encoding="utf-8").splitlines()
    return [
        (name, version.partition("+")[0])
        for line in lines
        if not line.startswith("#")
        for name, _, version in [line.partition("==")]
    ]


def ask(packages: Sequence[tuple[str, str]], more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What pip-audit says of each package; nothing where it cannot work."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in packages)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            file.name,
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
        ]
        done = subprocess.run([*command, "--progress-spinner", "off", *more], capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        print("\n".join(done.stderr.splitlines()[-1:]), file=sys.stderr)
        return []
    return found


def report(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each vulnerability: what, where, and the version that has it no more."""
    return [
        f"{one['name']} {one['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version yet'}"
        for one in found
        for fault in one.get("vulns", [])
    ]


def main(targets: Sequence[str]) -> int:
    """Ask about each package once."""
    asked: set[tuple[str, str]] = set()
    lines: list[str] = []
    told = 0
    for target in targets:
        packages = [one for one in pins(target) if one not in asked]
        asked.update(packages)
        found = ask(packages) if packages else []
        lines += report(found)
        told += sum("vulns" in one for one in found)
    print("\n".join(lines))
    print(f"{len(asked)} packages, {told} of them audited, {len(lines)} known vulnerabilities")
    if told < len(asked):
        print(
            f"warning: {len(asked) - told} packages could not be audited: no network, or no index that knows advisories",
            file=sys.stderr,
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
