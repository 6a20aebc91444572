"""docs/deploy.md (the handbook) and its table, the SBOM, the audit; and every file of deploy/ has a test."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.tools import DEPLOY, ROOT, help_of, python, run

HANDBOOK = ROOT / "docs" / "deploy.md"


def module(name: str) -> ModuleType:
    """Import a script of deploy/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_table_of_cards_is_what_cards_py_prints() -> None:
    result = run(sys.executable, DEPLOY / "cards.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in HANDBOOK.read_text(encoding="utf-8")


def test_cards_py_has_the_shapes_of_the_models() -> None:
    cards = module("cards")
    elements = {size: sum(math.prod(shape) for _, shape in cards.shapes(size, int4=False).values()) for size in cards.MODELS}
    assert elements["0.6B"] == 595_776_512  # the model's own count
    assert [round(elements[size] / 1e9, 1) for size in ("4B", "8B")] == [4.0, 7.6]


def test_files_that_the_handbook_names_exist() -> None:
    """In code blocks too; tests/test_documents.py checks links, anchors and make targets of all pages."""
    for path in re.findall(r"\bdeploy/[\w./-]*\w", HANDBOOK.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_flags_in_the_handbook_exist() -> None:
    text = HANDBOOK.read_text(encoding="utf-8")
    flags = {flag for command in ("serve", "quantize", "eval", "top") for flag in re.findall(r"--[\w-]+", help_of(command))}
    lines = [line for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    calls = [line for line in lines if re.match(r"\s*(sudo )?qembed ", line)] + re.findall(r"`(qembed [^`]+)`", text)
    assert calls
    for call in calls:
        assert set(re.findall(r"--[a-z][\w-]+", call)) <= flags, call
    for flag in re.findall(r"`(--[\w-]+)[^`]*`", text):
        assert flag in flags | {"--build-arg", "--secret"}, flag


@pytest.mark.slow
def test_the_sbom_has_every_package_of_each_image_with_its_licence(tmp_path: Path) -> None:
    result = run(python(), DEPLOY / "sbom.py", "--installed", sys.executable, "--output", tmp_path, "cpu", "gpu", "router")
    assert result.returncode == 0, result.stderr
    for target in ("cpu", "gpu", "router"):
        document = json.loads((tmp_path / f"qembed-{target}.cdx.json").read_text(encoding="utf-8"))
        assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
        lines = (DEPLOY / f"requirements/image-{target}.txt").read_text(encoding="utf-8").splitlines()
        pins = {line for line in lines if not line.startswith("#")}
        components = [part for part in document["components"] if part["purl"].startswith("pkg:pypi/")]
        assert {f"{part['name']}=={part['version']}" for part in components} == pins
    components = json.loads((tmp_path / "qembed-cpu.cdx.json").read_text(encoding="utf-8"))["components"]
    cpu = [
        part for part in components if part["purl"].startswith("pkg:pypi/")
    ]  # Debian packages are listed only after `make image`
    assert sum("licenses" in part for part in cpu) > 0.9 * len(cpu)


def test_the_sbom_lists_installed_debian_packages_only() -> None:
    sbom = module("sbom")
    status = (
        "Package: tini\nStatus: install ok installed\nArchitecture: amd64\nVersion: 0.19.0-1+b3\nDescription: x\n y\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    (package,) = sbom.debian(status)
    assert package["purl"] == "pkg:deb/debian/tini@0.19.0-1%2Bb3?arch=amd64"


def test_the_audit_reports_vulnerabilities_and_packages_that_could_not_be_audited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = module("audit")
    assert ("torch", "2.13.0") in audit.pins("cpu")  # not 2.13.0+cpu, which no advisory names
    monkeypatch.setattr(audit, "ask", lambda packages: [{"name": name, "skip_reason": "x"} for name, _ in packages])
    assert audit.main(["cpu"]) == 0
    assert "could not be audited" in capsys.readouterr().err
    fault = {"id": "PYSEC-1", "fix_versions": ["2"]}
    monkeypatch.setattr(
        audit,
        "ask",
        lambda packages: [
            {"name": name, "version": version, "vulns": [fault] * (name == "torch")} for name, version in packages
        ],
    )
    assert audit.main(["cpu", "gpu"]) == 1
    printed = capsys.readouterr()
    assert "torch 2.13.0: PYSEC-1, fixed in 2" in printed.out
    assert not printed.err


CHECKED_BY = {
    "README.md": "test_documents",
    "audit.py": "test_documents",
    "cards.py": "test_documents",
    "compose/": "test_compose",
    "demo.sh": "test_docker",
    "docker/": "test_docker",
    "kubernetes/": "test_kubernetes",
    "monitoring/": "test_monitoring",
    "ray/": "test_ray",
    "requirements/": "test_requirements",
    "sbom.py": "test_documents",
    "systemd/": "test_systemd",
}


def test_every_file_has_a_check() -> None:
    """A new file or folder of deploy/ fails here until CHECKED_BY names the test that checks it."""
    files = [path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()]
    unknown = [path for path in files if "__pycache__" not in path and not path.startswith(tuple(CHECKED_BY))]
    assert unknown == []
    for name in CHECKED_BY.values():
        assert Path(__file__).with_name(f"{name}.py").exists(), name


def position(text: str, *commands: str) -> list[int]:
    """Where each of `commands` begins in `text`."""
    return [text.index(command) for command in commands]


def test_the_checkpoint_comes_before_the_server() -> None:
    text = HANDBOOK.read_text(encoding="utf-8")
    compose = position(text, "./make-secrets.sh", "docker compose run --rm qembed quantize", "docker compose up --detach")
    systemd = position(text, "/etc/qembed/keys >", "systemctl start qembed-quantize", "systemctl enable --now qembed")
    cluster = position(text, "base/namespace.yaml", "make-secret.sh |", "overlays/cpu  ", "jobs/quantize-cpu", "kubectl wait")
    for order in (compose, systemd, cluster):
        assert order == sorted(order)
    header = (DEPLOY / "compose/compose.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    order = position(header, "./make-secrets.sh", "docker compose run --rm qembed quantize", "docker compose up --detach")
    assert order == sorted(order)


def test_keys_are_changed_everywhere() -> None:
    section = HANDBOOK.read_text(encoding="utf-8").partition("\n## Change keys\n")[2].partition("\n## ")[0]
    for words in (
        "secrets/keys",
        "/etc/qembed/keys",
        "systemctl restart",
        "edit secret",
        "secrets/metrics",
    ):
        assert words in section
