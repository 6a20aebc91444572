"""The compose files against the compose specification, and the arguments and files that they pass to each service."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qembed.vllm import api_keys as gate_keys
from qembed.vllm import shutdown, supervisor
from tests.deploy.tools import DEPLOY, plans, python, run, unknown_flags, value_of

HERE = DEPLOY / "compose"
CHECK = """
import sys, compose_spec
compose_spec.PyCompose.from_yaml(sys.stdin.read()).validate()
"""


def text(file: str, **variables: str) -> str:
    """A compose file with `variables` or their defaults filled in."""
    content = (HERE / file).read_text(encoding="utf-8")
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), content)


def services(**variables: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text("compose.yaml", **variables))["services"])


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_the_file_follows_the_compose_specification(file: str) -> None:
    result = run(python(), "-c", CHECK, input=text(file))
    assert result.returncode == 0, result.stderr.splitlines()[-1]


def test_qembed_accepts_the_arguments_and_has_time_to_shut_down(int4: Path, keys: Path) -> None:
    qembed = services()["qembed"]
    arguments = qembed["command"]
    assert unknown_flags(arguments) == []
    result = plans([*arguments, "--model", "named by QEMBED_MODEL"], int4, keys, "--device-memory", "T4")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["fits"]
    seconds = float(value_of(arguments, "--shutdown-timeout")) + supervisor.SERVING_GRACE + shutdown.KILL_GRACE
    assert float(qembed["stop_grace_period"].rstrip("s")) > seconds


def test_mounted_files_and_secrets_exist_at_the_paths_that_services_read() -> None:
    compose = yaml.safe_load(text("compose.yaml"))
    secrets = {f"/run/secrets/{name}" for name in compose["secrets"]}
    for name, service in compose["services"].items():
        for mount in service["volumes"]:
            source, target = mount.split(":")[:2]
            if source.startswith(".") and source != "./models":
                assert (HERE / source).exists(), (name, mount)
            elif not source.startswith("."):
                assert source in compose["volumes"], (name, mount)
            assert target.startswith("/")
    for name, service in compose["services"].items():
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
    assert value_of(compose["services"]["qembed"]["command"], "--api-key-file") in secrets
    assert compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] in secrets
    prometheus = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = [item for item in prometheus["scrape_configs"] if item["job_name"] == "qembed"]  # the job name in the alerts
    key_file = Path(job["authorization"]["credentials_file"])
    assert str(key_file) in secrets
    assert compose["services"]["prometheus"]["secrets"] == [key_file.name] != compose["services"]["qembed"]["secrets"]
    assert job["static_configs"] == [{"targets": ["qembed:8000"]}]
    mounts = dict(item.split(":")[:2] for item in compose["services"]["prometheus"]["volumes"])
    assert mounts["../monitoring/alerts.yaml"] == str(Path(mounts["./prometheus.yml"]).parent / prometheus["rule_files"][0])
    assert f"--config.file={mounts['./prometheus.yml']}" in compose["services"]["prometheus"]["command"]


def test_services_listen_on_loopback_with_the_least_privileges() -> None:
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name


def test_the_gpu_file_changes_the_image_and_requests_a_gpu() -> None:
    over = yaml.safe_load(text("compose.gpu.yaml"))["services"]
    assert list(over) == ["qembed"]
    assert over["qembed"]["image"] == "qembed:gpu"
    assert over["qembed"]["build"]["target"] == "gpu"
    (device,) = over["qembed"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_secrets_are_created_once_and_only_their_services_can_read_them(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("make-secrets.sh changes owners of files, which only root may")
    folder = tmp_path / "secrets"
    assert run(HERE / "make-secrets.sh", folder).returncode == 0
    secrets = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(secrets) == set(yaml.safe_load(text("compose.yaml"))["secrets"])
    clients, metrics = secrets["keys"].decode().split()
    assert secrets["metrics"].decode() == metrics != clients
    assert run(HERE / "make-secrets.sh", folder).returncode == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == secrets
    stat = {file.name: file.stat() for file in folder.iterdir()}
    assert (stat["keys"].st_uid, stat["keys"].st_gid, stat["keys"].st_mode & 0o777) == (10001, 0, 0o400)
    assert (stat["metrics"].st_uid, stat["metrics"].st_mode & 0o777) == (65534, 0o400)
    assert (stat["grafana"].st_uid, stat["grafana"].st_mode & 0o777) == (472, 0o400)
    assert folder.stat().st_mode & 0o077 == 0
    assert len(gate_keys.find(folder / "keys", {})) == 2
    assert gate_keys.readers(folder / "keys") != "every user of this machine"
    assert folder.name + "/" in (HERE / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_existing_keys_stay_and_prometheus_gets_a_key_of_its_own(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("make-secrets.sh changes owners of files, which only root may")
    (tmp_path / "keys").write_text("first\nsecond")
    assert run(HERE / "make-secrets.sh", tmp_path).returncode == 0
    metrics = (tmp_path / "metrics").read_text()
    assert (tmp_path / "keys").read_text() == f"first\nsecond\n{metrics}\n"
    assert len(metrics.split()) == 1


def test_the_served_model_name_is_the_same_for_int4_and_fp16() -> None:
    int4, fp16 = (services(QEMBED_WEIGHTS=weights)["qembed"]["command"] for weights in ("int4", "fp16"))
    assert services()["qembed"]["command"] == int4
    assert "--int4" in int4
    assert [word for word in int4 if word not in fp16] == ["--int4"]
    assert [word for word in fp16 if word not in int4] == ["--fp16"]
    assert value_of(fp16, "--served-model-name")
    assert unknown_flags(fp16) == []


def test_the_cpu_image_can_be_built_with_pytorchs_index() -> None:
    build = services(PIP_EXTRA_INDEX_URL="https://example.com/whl/cpu")["qembed"]["build"]
    assert build["args"] == {"PIP_EXTRA_INDEX_URL": "https://example.com/whl/cpu"}
    dockerfile = (HERE / build["context"] / build["dockerfile"]).read_text(encoding="utf-8")
    (stage,) = re.findall(r"^FROM runtime AS cpu$(.*?)^FROM", dockerfile, re.MULTILINE | re.DOTALL)
    assert "ARG PIP_EXTRA_INDEX_URL" in stage


def test_prometheus_sends_alerts_to_the_alertmanager() -> None:
    compose = services()
    prometheus = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    (manager,) = prometheus["alerting"]["alertmanagers"]
    (target,) = manager["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert compose[name]["ports"][0].endswith(f":{port}")
    mounts = dict(item.split(":")[:2] for item in compose[name]["volumes"])
    assert f"--config.file={mounts['./alertmanager.yml']}" in compose[name]["command"]
