"""The compose files by the compose specification, and by what they hand to qembed, Prometheus and Grafana."""

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
    """A compose file with its variables at their defaults, or as given."""
    content = (HERE / file).read_text(encoding="utf-8")
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), content)


def services(**variables: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text("compose.yaml", **variables))["services"])


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_what_the_compose_specification_says(file: str) -> None:
    done = run(python(), "-c", CHECK, input=text(file))
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_qembed_takes_the_arguments_and_has_time_to_end(int4: Path, keys: Path) -> None:
    qembed = services()["qembed"]
    arguments = qembed["command"]
    assert unknown_flags(arguments) == []
    done = plans([*arguments, "--model", "named by QEMBED_MODEL"], int4, keys, "--device-memory", "T4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    needed = float(value_of(arguments, "--shutdown-timeout")) + supervisor.SERVING_GRACE + shutdown.KILL_GRACE
    assert float(qembed["stop_grace_period"].rstrip("s")) > needed


def test_what_is_mounted_is_there_and_where_it_is_looked_for() -> None:
    described = yaml.safe_load(text("compose.yaml"))
    secrets = {f"/run/secrets/{name}" for name in described["secrets"]}
    for name, service in described["services"].items():
        for mount in service["volumes"]:
            source, target = mount.split(":")[:2]
            if source.startswith(".") and source != "./models":
                assert (HERE / source).exists(), (name, mount)
            elif not source.startswith("."):
                assert source in described["volumes"], (name, mount)
            assert target.startswith("/")
    for name, service in described["services"].items():
        assert set(service.get("secrets", [])) <= set(described["secrets"]), name
    assert value_of(described["services"]["qembed"]["command"], "--api-key-file") in secrets
    assert described["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] in secrets
    scraped = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = [one for one in scraped["scrape_configs"] if one["job_name"] == "qembed"]  # the job that the alerts are for
    sent = Path(job["authorization"]["credentials_file"])
    assert str(sent) in secrets
    assert described["services"]["prometheus"]["secrets"] == [sent.name] != described["services"]["qembed"]["secrets"]
    assert job["static_configs"] == [{"targets": ["qembed:8000"]}]
    mounts = dict(one.split(":")[:2] for one in described["services"]["prometheus"]["volumes"])
    assert mounts["../monitoring/alerts.yaml"] == str(Path(mounts["./prometheus.yml"]).parent / scraped["rule_files"][0])
    assert f"--config.file={mounts['./prometheus.yml']}" in described["services"]["prometheus"]["command"]


def test_nothing_is_open_to_the_network_or_more_privileged_than_it_must_be() -> None:
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name


def test_the_gpu_file_changes_the_image_and_asks_for_a_card() -> None:
    over = yaml.safe_load(text("compose.gpu.yaml"))["services"]
    assert list(over) == ["qembed"]
    assert over["qembed"]["image"] == "qembed:gpu"
    assert over["qembed"]["build"]["target"] == "gpu"
    (device,) = over["qembed"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_secrets_are_made_once_and_for_their_readers_only(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("make-secrets.sh gives files away, which only root may")
    folder = tmp_path / "secrets"
    assert run(HERE / "make-secrets.sh", folder).returncode == 0
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(made) == set(yaml.safe_load(text("compose.yaml"))["secrets"])
    clients, metrics = made["keys"].decode().split()
    assert made["metrics"].decode() == metrics != clients
    assert run(HERE / "make-secrets.sh", folder).returncode == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == made
    about = {file.name: file.stat() for file in folder.iterdir()}
    assert (about["keys"].st_uid, about["keys"].st_gid, about["keys"].st_mode & 0o777) == (10001, 0, 0o400)
    assert (about["metrics"].st_uid, about["metrics"].st_mode & 0o777) == (65534, 0o400)
    assert (about["grafana"].st_uid, about["grafana"].st_mode & 0o777) == (472, 0o400)
    assert folder.stat().st_mode & 0o077 == 0
    assert len(gate_keys.find(folder / "keys", {})) == 2
    assert not gate_keys.is_exposed(folder / "keys")
    assert folder.name + "/" in (HERE / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_a_folder_of_secrets_with_other_keys_gets_prometheus_a_key_of_its_own(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("make-secrets.sh gives files away, which only root may")
    (tmp_path / "keys").write_text("first\nsecond")
    assert run(HERE / "make-secrets.sh", tmp_path).returncode == 0
    metrics = (tmp_path / "metrics").read_text()
    assert (tmp_path / "keys").read_text() == f"first\nsecond\n{metrics}\n"
    assert len(metrics.split()) == 1


def test_the_name_for_clients_is_the_same_for_int4_and_fp16() -> None:
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
    described = services()
    scraped = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    (manager,) = scraped["alerting"]["alertmanagers"]
    (target,) = manager["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert described[name]["ports"][0].endswith(f":{port}")
    mounts = dict(one.split(":")[:2] for one in described[name]["volumes"])
    assert f"--config.file={mounts['./alertmanager.yml']}" in described[name]["command"]
