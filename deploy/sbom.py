"""What is in the images, as CycloneDX 1.6: `python deploy/sbom.py --installed PYTHON TARGET …`   (`make sbom`).

Writes build/sbom/qembed-TARGET.cdx.json. cyclonedx-py makes the list of Python packages from the one that the image is built
from. Licences, descriptions and who needs whom come from PYTHON's environment, as far as it has the same versions. Where
deploy/docker/try.sh has built an image for CPUs, its Debian packages are in it too, with their versions; that needs the image,
for Debian's packages are not pinned.
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
TAKEN = ("licenses", "description", "externalReferences")


def cyclonedx(*arguments: object) -> dict[str, Any]:
    """What cyclonedx-py writes."""
    options = ["--spec-version", VERSION, "--output-format", "JSON", "--output-reproducible"]
    command = [sys.executable, "-m", "cyclonedx_py", *map(str, arguments), *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def identity(component: dict[str, Any]) -> tuple[str, str]:
    """Name and version, as an index compares them."""
    return re.sub(r"[-_.]+", "-", component["name"]).lower(), component.get("version", "")


def enrich(document: dict[str, Any], installed: dict[str, Any]) -> None:
    """Take from `installed` what it says of the same versions: licences and the like, and who needs whom."""
    known = {identity(one): one for one in installed.get("components", [])}
    names: dict[str, str] = {}
    for component in document["components"]:
        same = known.get(identity(component))
        if same:
            component.update({name: same[name] for name in TAKEN if name in same})
            names[same["bom-ref"]] = component["bom-ref"]
    needs = {one["ref"]: one.get("dependsOn", []) for one in installed.get("dependencies", [])}
    for theirs, ours in names.items():
        found = sorted(names[one] for one in needs.get(theirs, []) if one in names)
        (entry,) = [one for one in document["dependencies"] if one["ref"] == ours]
        if found:
            entry["dependsOn"] = found


def debian(status: str) -> list[dict[str, Any]]:
    """The packages that dpkg's status file says are installed."""
    found = []
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{name}@{version.replace(':', '%3A').replace('+', '%2B')}?arch={fields['Architecture']}"
            found.append({"type": "library", "bom-ref": f"deb/{name}", "name": name, "version": version, "purl": purl})
    return found


def make(target: str, installed: dict[str, Any], status: str | None) -> dict[str, Any]:
    """The document for one image."""
    project = ROOT / "pyproject.toml"
    document = cyclonedx("requirements", "--pyproject", project, ROOT / "deploy" / "requirements" / f"image-{target}.txt")
    document["metadata"]["component"].update({"type": "container", "name": f"qembed-{target}"})
    enrich(document, installed)
    packages = debian(status) if status else []
    document["components"] += packages
    document["dependencies"] += [{"ref": one["bom-ref"]} for one in packages]
    return document


def faults(text: str) -> str | None:
    """What is not as CycloneDX's own schema wants it, strictly; None if nothing is."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if found is None else str(found)


def main() -> int:
    """Write and check the documents."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--installed", default=sys.executable, help="a Python that has the packages installed")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("targets", nargs="+")
    asked = parser.parse_args()
    installed = cyclonedx("environment", asked.installed)
    asked.output.mkdir(parents=True, exist_ok=True)
    for target in asked.targets:
        status = DPKG.read_text(encoding="utf-8") if target == "cpu" and DPKG.exists() else None
        document = make(target, installed, status)
        text = json.dumps(document, indent=2) + "\n"
        if wrong := faults(text):
            print(f"{target}: {wrong}", file=sys.stderr)
            return 1
        file = asked.output / f"qembed-{target}.cdx.json"
        file.write_text(text, encoding="utf-8")
        components = document["components"]
        licensed = sum("licenses" in one for one in components)
        print(f"{file}: {len(components)} components, {licensed} with a licence{'' if status else ', without Debian packages'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
