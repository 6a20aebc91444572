"""`qembed doctor` on machines that lack something."""

from __future__ import annotations

import json
import resource
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qembed import cgroup
from qembed.cli import group
from qembed.serve import doctor
from qembed.vllm import kernels, machine, ports


def run_doctor(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run `qembed doctor`; returns the exit code and the checks by name."""
    result = CliRunner().invoke(group, ["doctor", "--json", "--offline", "--port", "0", *arguments])
    report = json.loads(result.stdout)
    assert report["ok"] == (result.exit_code == 0)
    return result.exit_code, {check["name"]: check for check in report["checks"]}


def test_every_deciding_fact_is_listed() -> None:
    code, checks = run_doctor()
    assert code == 0
    assert {"system", "CPU", "GPU", "packages", "vLLM", "INT4", "memory", "cores", "port", "cache"} <= checks.keys()
    assert {f"extra {name}" for name in doctor.EXTRAS} <= checks.keys()
    assert checks["INT4"]["value"].startswith(kernels.choose(kernels.this_cpu(), int4=True).title)
    text = CliRunner().invoke(group, ["doctor", "--offline", "--port", "0"]).stdout
    assert "✔" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("problem", ["no vLLM", "no AVX2"])
def test_a_missing_prerequisite_of_serving_is_exit_code_1(
    problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if problem == "no vLLM":
        monkeypatch.setattr(machine, "find_spec", lambda _: None)
    else:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text("flags : sse2\n")
        monkeypatch.setattr(machine.check_device, "__defaults__", (cpuinfo,))
        monkeypatch.setattr(machine, "_is_cpu_build", lambda: True)
    code, checks = run_doctor()
    assert code == 1
    assert checks["vLLM"]["state"] == "fail"
    assert checks["vLLM"]["advice"]


def test_limits_and_missing_parts_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "cpus", lambda: 1.0)
    monkeypatch.setattr(cgroup, "memory", lambda *_: cgroup.Memory(2**32, 2**31))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "faiss" else object())
    with ports.listen("127.0.0.1", 0) as listener:
        code, checks = run_doctor("--port", str(listener.getsockname()[1]))
    assert code == 0
    assert checks["cores"]["value"].startswith("1 used")
    assert "quota 1" in checks["cores"]["value"]
    assert (checks["memory"]["state"], "2.0 GiB free of 4.0 GiB" in checks["memory"]["value"]) == ("ok", True)
    assert checks["port"]["state"] == "note"
    assert [checks[f"extra {name}"]["state"] for name in ("search", "eval", "ray")] == ["note", "note", "ok"]


def limit(monkeypatch: pytest.MonkeyPatch, resource_limit: int, value: int) -> None:
    known = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (value, resource.RLIM_INFINITY) if which == resource_limit else known(which)
    )


@pytest.mark.parametrize(("files", "state"), [(64, "fail"), (128, "note"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_too_few_open_files_for_vllm_are_exit_code_1(files: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, resource.RLIMIT_NOFILE, files)
    code, checks = run_doctor()
    assert (code, checks["open files"]["state"]) == (1 if state == "fail" else 0, state)


@pytest.mark.parametrize("kind", ["control group", "address space"])
def test_too_little_memory_for_the_default_model_is_exit_code_1(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "control group":
        monkeypatch.setattr(cgroup, "memory", lambda *_: cgroup.Memory(2**30, 2**29))
    else:
        limit(monkeypatch, resource.RLIMIT_AS, 2**29)
    code, checks = run_doctor()
    assert (code, checks["memory"]["state"]) == (1, "fail")
    assert "512 MiB free" in checks["memory"]["value"]
    assert kind in checks["memory"]["value"]


@pytest.mark.parametrize("name", ["torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"])
def test_a_missing_or_old_package_of_all_commands_is_exit_code_1(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "find_spec", lambda module: None if module == name else find_spec(module))
        code, checks = run_doctor()
    assert (code, checks["packages"]["value"]) == (1, f"no {name}")
    assert f"pip install '{name}>=" in checks["packages"]["advice"]
    monkeypatch.setattr(doctor.metadata, "version", lambda module: "0.0.1" if module == name else version(module))
    code, checks = run_doctor()
    assert (code, f"{name} 0.0.1, where {name}>=" in checks["packages"]["value"]) == (1, True)


def test_a_hub_that_does_not_answer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert doctor.hub().state == "note"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub().value
