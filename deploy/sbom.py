"""The contents of the images as CycloneDX 1.6: `python deploy/sbom.py --installed PYTHON TARGET …`   (`make sbom`).

Writes build/sbom/qembed-TARGET.cdx.json. cyclonedx-py lists the Python packages from the pinned list that the image is built
from. Licences, descriptions and dependencies come from PYTHON's environment, as far as it has the same versions. If
deploy/docker/try.sh has built the image for CPUs, its Debian packages are listed too; that needs the image, because Debian
packages are not pinned.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DPKG = ROOT / "build" / "image" / "dpkg-status"
OUTPUT = ROOT / "build" / "sbom"
VERSION = "1.6"
COPIED = ("licenses", "description", "externalReferences")


def cyclonedx(*arguments: object) -> dict[str, Any]:
    """The document that cyclonedx-py writes. `main` validates the complete one, so it is not validated here."""
    options = ["--spec-version", VERSION, "--output-format", "JSON", "--output-reproducible", "--no-validate"]
    command = [sys.executable, "-m", "cyclonedx_py", *map(str, arguments), *options]
    document: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return document


def identity(component: dict[str, Any]) -> tuple[str, str]:
    """Normalized name, and version."""
    return re.sub(r"[-_.]+", "-", component["name"]).lower(), component.get("version", "")


def enrich(document: dict[str, Any], installed: dict[str, Any]) -> None:
    """Add licences, descriptions and dependencies from `installed` to the components with the same versions."""
    known = {identity(item): item for item in installed.get("components", [])}
    names: dict[str, str] = {}
    for component in document["components"]:
        counterpart = known.get(identity(component))
        if counterpart:
            component.update({name: counterpart[name] for name in COPIED if name in counterpart})
            names[counterpart["bom-ref"]] = component["bom-ref"]
    needs = {item["ref"]: item.get("dependsOn", []) for item in installed.get("dependencies", [])}
    for theirs, ours in names.items():
        dependencies = sorted(names[item] for item in needs.get(theirs, []) if item in names)
        (entry,) = [item for item in document["dependencies"] if item["ref"] == ours]
        if dependencies:
            entry["dependsOn"] = dependencies


def debian(status: str) -> list[dict[str, Any]]:
    """The packages that dpkg's status file says are installed."""
    packages = []
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{name}@{version.replace(':', '%3A').replace('+', '%2B')}?arch={fields['Architecture']}"
            packages.append({"type": "library", "bom-ref": f"deb/{name}", "name": name, "version": version, "purl": purl})
    return packages


def make(target: str, installed: dict[str, Any], status: str | None) -> dict[str, Any]:
    """The document for one image."""
    project = ROOT / "pyproject.toml"
    document = cyclonedx("requirements", "--pyproject", project, ROOT / "deploy" / "requirements" / f"image-{target}.txt")
    document["metadata"]["component"].update({"type": "container", "name": f"qembed-{target}"})
    enrich(document, installed)
    packages = debian(status) if status else []
    document["components"] += packages
    document["dependencies"] += [{"ref": package["bom-ref"]} for package in packages]
    return document


def faults(text: str) -> str | None:
    """The errors against CycloneDX's own strict schema; None if there are none."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if error is None else str(error)


def main() -> int:
    """Write and check the documents."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--installed", default=sys.executable, help="a Python that has the packages installed")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("targets", nargs="+")
    options = parser.parse_args()
    installed = cyclonedx("environment", options.installed)
    options.output.mkdir(parents=True, exist_ok=True)
    for target in options.targets:
        status = DPKG.read_text(encoding="utf-8") if target == "cpu" and DPKG.exists() else None
        document = make(target, installed, status)
        text = json.dumps(document, indent=2) + "\n"
        if errors := faults(text):
            print(f"{target}: {errors}", file=sys.stderr)
            return 1
        file = options.output / f"qembed-{target}.cdx.json"
        file.write_text(text, encoding="utf-8")
        components = document["components"]
        licensed = sum("licenses" in component for component in components)
        print(f"{file}: {len(components)} components, {licensed} with a licence{'' if status else ', without Debian packages'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
