"""The units against systemd-analyze, and the arguments that they pass to qembed."""

from __future__ import annotations

import configparser
import json
import os
import shlex
from pathlib import Path

import pytest

from qembed.vllm import shutdown, supervisor
from tests.deploy.tools import DEPLOY, QEMBED, plans, run, tool, unknown_flags, value_of

HERE = DEPLOY / "systemd"
EXPOSURE = {False: 16, True: 18}  # in tenths, without and with a GPU; a unit without any hardening has 9.6


class Unit(configparser.RawConfigParser):
    def __init__(self, name: str = "qembed.service") -> None:
        super().__init__(strict=False, delimiters=("=",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read(HERE / name, encoding="utf-8")


def environment() -> dict[str, str]:
    """The variables of the file `environment`."""
    lines = (HERE / "environment").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")


@pytest.fixture(params=["qembed.service", "qembed-quantize.service"])
def unit(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A unit as installed, with the path of this environment's qembed."""
    file = tmp_path / str(request.param)
    content = (HERE / file.name).read_text(encoding="utf-8").replace("/opt/qembed/bin/qembed", QEMBED)
    file.write_text(content, encoding="utf-8")
    return file


def with_gpu(unit: Path) -> None:
    folder = unit.with_name(f"{unit.name}.d")
    folder.mkdir()
    (folder / "gpu.conf").write_bytes((HERE / "qembed.service.d/gpu.conf").read_bytes())


@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_verifies_the_unit(unit: Path, gpu: bool) -> None:
    if gpu:
        with_gpu(unit)
    result = run(tool("systemd-analyze", "systemd"), "verify", "--man=no", unit)
    assert (result.stdout + result.stderr, result.returncode) == ("", 0)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_exposure_level_is_low(unit: Path, gpu: bool) -> None:
    if gpu:
        with_gpu(unit)
    result = run(tool("systemd-analyze", "systemd"), "security", "--offline=yes", f"--threshold={EXPOSURE[gpu]}", unit)
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze looks only at running units")
    assert result.returncode == 0, result.stdout.splitlines()[-1]


def test_the_gpu_file_allows_only_nvidia_devices() -> None:
    lines = [line for line in (HERE / "qembed.service.d/gpu.conf").read_text(encoding="utf-8").splitlines() if "=" in line]
    assert lines == ["PrivateDevices=no", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw"]


def test_qembed_accepts_the_arguments_and_has_time_to_shut_down(int4: Path, keys: Path) -> None:
    service = Unit()["Service"]
    assert service["EnvironmentFile"] == "-/etc/qembed/environment"
    credentials = service["LoadCredential"].partition(":")[0]
    program, *words = shlex.split(service["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", "/credentials"))
    assert program == "/opt/qembed/bin/qembed"
    assert words.pop() == "$QEMBED_OPTIONS"
    arguments = [*words, *shlex.split(environment()["QEMBED_OPTIONS"])]
    assert value_of(arguments, "--api-key-file") == f"/credentials/{credentials}"
    assert unknown_flags(arguments) == []
    result = plans([*arguments, "--model", "found"], int4, keys, "--device-memory", "T4")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["fits"]
    seconds = float(value_of(arguments, "--shutdown-timeout")) + supervisor.SERVING_GRACE + shutdown.KILL_GRACE
    assert float(service["TimeoutStopSec"]) > seconds


def test_only_qembed_gets_the_stop_signal_and_it_may_restart_vllm() -> None:
    service = Unit()["Service"]
    assert service["KillMode"] == "mixed"  # control-group would stop vLLM before it has answered
    assert service["OOMPolicy"] == "continue"
    assert "AF_NETLINK" in service["RestrictAddressFamilies"]
    assert "ProcSubset" not in service  # it would hide /proc/meminfo from the plan
    assert os.path.commonpath([service["WorkingDirectory"], "/var/lib/" + service["StateDirectory"]]) == "/var/lib/qembed"


def test_the_served_model_name_does_not_depend_on_the_weights() -> None:
    assert value_of(shlex.split(environment()["QEMBED_OPTIONS"]), "--served-model-name")
    assert "--int4" not in Unit()["Service"]["ExecStart"]  # --fp16 can be added


def test_the_quantize_unit_writes_where_the_server_reads() -> None:
    quantize, serve = Unit("qembed-quantize.service")["Service"], Unit()["Service"]
    program, *words = shlex.split(quantize["ExecStart"])
    assert program == shlex.split(serve["ExecStart"])[0]
    assert words == ["quantize", "$QEMBED_QUANTIZE_OPTIONS"]
    options = shlex.split(environment()["QEMBED_QUANTIZE_OPTIONS"])
    assert unknown_flags(["quantize", *options]) == []
    assert value_of(options, "--model").split("/")[1] == value_of(
        shlex.split(environment()["QEMBED_OPTIONS"]), "--served-model-name"
    )
    for name in ("User", "DynamicUser", "StateDirectory", "CacheDirectory", "WorkingDirectory", "Environment", "UMask"):
        assert quantize[name] == serve[name], name
    assert quantize["UnsetEnvironment"] == "QEMBED_MODEL"
