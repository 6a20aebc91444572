"""Alerts by promtool, the dashboard by its structure; that every metric exists is for tests/e2e/test_prometheus.py to see."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, run, tool

HERE = DEPLOY / "monitoring"
COMPOSE = DEPLOY / "compose"


def load(file: str) -> Any:
    return yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("monitoring/alerts.yaml")["groups"] for rule in group["rules"]]


def test_alerts_ring_where_they_must_and_nowhere_else() -> None:
    done = run(tool("promtool", "prometheus"), "test", "rules", HERE / "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_ring_and_not_to() -> None:
    tried = [one for test in load("monitoring/alerts_test.yaml")["tests"] for one in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts()}
    assert {one["alertname"] for one in tried if one["exp_alerts"]} == names
    assert {one["alertname"] for one in tried if not one["exp_alerts"]} == names


def test_prometheus_takes_its_configuration(tmp_path: Any) -> None:
    for file in (COMPOSE / "prometheus.yml", HERE / "alerts.yaml"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    done = run(tool("promtool", "prometheus"), "check", "config", "--syntax-only", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_handbook_says_what_to_do_for_each_alert() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/deploy.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in anchors


def test_the_dashboard_is_one_that_grafana_lays_out() -> None:
    dashboard = json.loads((HERE / "dashboard.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (a, b)
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"} <= variables
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]


@pytest.mark.parametrize(
    "wanted",
    ["qembed_requests_total", "qembed_texts_in_flight", "histogram_quantile(0.99", "qembed_tokens_total", "qembed_memory_bytes",
     "qembed_planned_bytes", 'status="503"', "qembed_restarts"],
)  # fmt: skip
def test_the_dashboard_shows(wanted: str) -> None:
    panels = json.loads((HERE / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert any(wanted in target["expr"] for panel in panels for target in panel["targets"])


def test_grafana_is_given_the_dashboard_and_the_prometheus_that_are_there() -> None:
    services = load("compose/compose.yaml")["services"]
    (source,) = load("compose/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = load("compose/grafana/provisioning/dashboards/qembed.yaml")["providers"]
    mounts = dict(one.split(":")[:2] for one in services["grafana"]["volumes"])
    assert mounts["../monitoring/dashboard.json"].startswith(provider["options"]["path"] + "/")
    assert (
        mounts["../monitoring/dashboard.json"]
        == services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    )
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_each_severity_of_the_alerts_has_a_receiver_in_compose_and_on_kubernetes() -> None:
    config = load("compose/alertmanager.yml")
    assert load("monitoring/alertmanager-values.yaml")["alertmanager"]["config"] == config
    receivers = {receiver["name"] for receiver in config["receivers"]}
    route = config["route"]
    matched = {re.fullmatch(r'severity="(\w+)"', each["matchers"][0])[1]: each["receiver"] for each in route["routes"]}  # type: ignore
    severities = {rule["labels"]["severity"] for rule in alerts()}
    called = {severity: matched.get(severity, route["receiver"]) for severity in severities}
    assert called == {"page": "pages", "ticket": "tickets"}
    assert set(called.values()) == receivers
    names = {rule["alert"] for rule in alerts()}
    (inhibited,) = config["inhibit_rules"]
    assert inhibited["source_matchers"] == ['alertname="QembedDown"']
    assert "QembedDown" in names
    assert all(name.startswith("Qembed") for name in names)


def test_alertmanager_takes_its_configuration() -> None:
    done = run(tool("amtool", "prometheus-alertmanager"), "check-config", COMPOSE / "alertmanager.yml")
    assert done.returncode == 0, done.stdout + done.stderr
