"""A real Prometheus, configured as in deploy/, scrapes a real server: every panel has data, every alert its metrics."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yaml

from qembed.vllm import ports
from tests.deploy.tools import DEPLOY, tool
from tests.e2e.http import embed, metric, send
from tests.e2e.launcher import Launched

pytestmark = pytest.mark.vllm

SCRAPES = 1.0
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$job": ".*"}
NAME = re.compile(r"\b(?:qembed_|vllm:)\w+|\bup\b")


@pytest.fixture(scope="module")
def busy(int4_server: Launched) -> Launched:
    """The server after requests of every kind: answered, bad, and refused by the full queue."""
    texts = [f"text {number}" for number in range(2048)]
    statuses: list[int] = []
    ask = lambda: statuses.append(embed(int4_server.url, timeout=600, input=texts, dimensions=32).status)  # noqa: E731
    flood = [threading.Thread(target=ask) for _ in range(3)]
    for thread in flood:
        thread.start()
    while metric(int4_server.url, "qembed_texts_in_flight") == 0 and any(thread.is_alive() for thread in flood):
        time.sleep(0.02)
    probe = send(int4_server.url, "GET", "/health", timeout=10)  # timeoutSeconds of the probes in deploy/kubernetes
    assert probe.status == 200
    for thread in flood:
        thread.join(600)
    assert sorted(set(statuses)) == [200, 503]
    assert embed(int4_server.url, input="").status == 400
    return int4_server


@pytest.fixture(scope="module")
def prometheus(busy: Launched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus's base URL. Its configuration is that of compose, except for the server's address and the interval."""
    program = tool("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPES:g}s", "evaluation_interval": f"{SCRAPES:g}s"}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "qembed"]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [urlsplit(busy.url).netloc]}]
    (folder / "key").write_text("a-key-for-tests\n")
    job["authorization"]["credentials_file"] = str(folder / "key")
    config["rule_files"] = [str(DEPLOY / "monitoring" / name) for name in config["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = ports.free("127.0.0.1")
    options = [
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: _ready(url), process, folder / "log")
        _until(lambda: bool(query(url, "count_over_time(qembed_queue_limit[1m]) >= 4")), process, folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _until(reached: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _ready(url: str) -> bool:
    try:
        return send(url, "GET", "/-/ready").status == 200
    except OSError:
        return False


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """The result of an instant query."""
    answer = send(url, "GET", f"/api/v1/query?query={quote(expression)}").json
    assert answer["status"] == "success", (expression, answer)
    return list(answer["data"]["result"])


def panels() -> dict[str, str]:
    """The dashboard's expressions with its variables filled in, by a unique name."""
    expressions = {}
    for panel in json.loads((DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            expressions[f"{panel['title']}-{target['refId']}-{panel['id']}"] = expression
    return expressions


@pytest.mark.parametrize("panel", panels())
def test_the_panel_has_data(prometheus: str, panel: str) -> None:
    assert query(prometheus, panels()[panel])


def test_every_alert_can_be_computed_and_its_metrics_exist(prometheus: str) -> None:
    _until_evaluated(prometheus)
    rules = [rule for group in send(prometheus, "GET", "/api/v1/rules").json["data"]["groups"] for rule in group["rules"]]
    configured = [
        rule for group in yaml.safe_load((DEPLOY / "monitoring/alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in configured]
    for rule in rules:
        assert rule["health"] == "ok", rule
        names = set(NAME.findall(rule["query"])) - {"by", "le"}
        assert names, rule
        for name in names:
            assert query(prometheus, name), (rule["name"], name)


def _until_evaluated(url: str) -> None:
    deadline = time.monotonic() + 30
    while any(
        rule["health"] == "unknown"
        for group in send(url, "GET", "/api/v1/rules").json["data"]["groups"]
        for rule in group["rules"]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_every_label_in_an_alert_exists(prometheus: str) -> None:
    assert query(prometheus, 'qembed_requests_total{status="503"}')
    assert query(prometheus, 'qembed_requests_total{status=~"4.."}')
    assert query(prometheus, 'qembed_planned_bytes{part="total"}')
    assert query(prometheus, 'up{job="qembed"} == 1')


def test_the_autoscalers_metrics_exist(prometheus: str) -> None:
    values = yaml.safe_load((DEPLOY / "kubernetes/components/autoscale/adapter-values.yaml").read_text(encoding="utf-8"))
    for rule in values["rules"]["custom"]:
        assert query(prometheus, rule["seriesQuery"].partition("{")[0])
