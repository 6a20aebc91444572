"""Known vulnerabilities in the images, by pip-audit: `python deploy/audit.py cpu gpu router`   (`make audit`).

pip-audit also reports "No known vulnerabilities found" if it could not look anything up, as without a network; here that is a
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
    """Name and version of each package of an image, without local versions: advisories name 2.13.0, not 2.13.0+cpu."""
    lines = (LISTS / f"image-{target}.txt").read_text(encoding="utf-8").splitlines()
    return [
        (name, version.partition("+")[0])
        for line in lines
        if not line.startswith("#")
        for name, _, version in [line.partition("==")]
    ]


def ask(packages: Sequence[tuple[str, str]], options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """pip-audit's result for each package; empty if it fails."""
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
        result = subprocess.run([*command, "--progress-spinner", "off", *options], capture_output=True, text=True, check=False)
    try:
        audited: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, LookupError):
        print("\n".join(result.stderr.splitlines()[-1:]), file=sys.stderr)
        return []
    return audited


def report(audited: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each vulnerability: package, id, and the fixed versions."""
    return [
        f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}"
        for package in audited
        for fault in package.get("vulns", [])
        for fixed in [", ".join(fault["fix_versions"]) or "no version yet"]
    ]


def main(targets: Sequence[str]) -> int:
    """Audit each package once; returns the exit code."""
    seen_packages: set[tuple[str, str]] = set()
    lines: list[str] = []
    audited_count = 0
    for target in targets:
        packages = [package for package in pins(target) if package not in seen_packages]
        seen_packages.update(packages)
        audited = ask(packages) if packages else []
        lines += report(audited)
        audited_count += sum("vulns" in package for package in audited)
    print("\n".join(lines))
    print(f"{len(seen_packages)} packages, {audited_count} of them audited, {len(lines)} known vulnerabilities")
    if audited_count < len(seen_packages):
        print(
            f"warning: {len(seen_packages) - audited_count} packages could not be audited: "
            "no network, or an index without advisories",
            file=sys.stderr,
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
