"""Alerts by promtool, the dashboard by its structure. tests/e2e/test_prometheus.py checks that every metric exists."""

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


def test_alerts_fire_as_alerts_test_yaml_expects() -> None:
    result = run(tool("promtool", "prometheus"), "test", "rules", HERE / "alerts_test.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in load("monitoring/alerts_test.yaml")["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_the_configuration_of_prometheus_is_valid(tmp_path: Any) -> None:
    for file in (COMPOSE / "prometheus.yml", HERE / "alerts.yaml"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    result = run(tool("promtool", "prometheus"), "check", "config", "--syntax-only", tmp_path / "prometheus.yml")
    assert result.returncode == 0, result.stdout + result.stderr


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


def test_panels_of_the_dashboard_have_unique_ids_and_do_not_overlap() -> None:
    dashboard = json.loads((HERE / "dashboard.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        disjoint = (
            a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        )
        assert disjoint, (a, b)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"} <= variables
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]


@pytest.mark.parametrize(
    "part",
    ["qembed_requests_total", "qembed_texts_in_flight", "histogram_quantile(0.99", "qembed_tokens_total", "qembed_memory_bytes",
     "qembed_planned_bytes", 'status="503"', "qembed_restarts"],
)  # fmt: skip
def test_the_dashboard_shows(part: str) -> None:
    panels = json.loads((HERE / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert any(part in target["expr"] for panel in panels for target in panel["targets"])


def test_grafana_is_provisioned_with_the_dashboard_and_the_prometheus_of_compose() -> None:
    services = load("compose/compose.yaml")["services"]
    (source,) = load("compose/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = load("compose/grafana/provisioning/dashboards/qembed.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
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
    routed = {re.fullmatch(r'severity="(\w+)"', child["matchers"][0])[1]: child["receiver"] for child in route["routes"]}  # type: ignore
    severities = {rule["labels"]["severity"] for rule in alerts()}
    receiver_by_severity = {severity: routed.get(severity, route["receiver"]) for severity in severities}
    assert receiver_by_severity == {"page": "pages", "ticket": "tickets"}
    assert set(receiver_by_severity.values()) == receivers
    names = {rule["alert"] for rule in alerts()}
    (inhibition,) = config["inhibit_rules"]
    assert inhibition["source_matchers"] == ['alertname="QembedDown"']
    assert "QembedDown" in names
    assert all(name.startswith("Qembed") for name in names)


def test_the_configuration_of_alertmanager_is_valid() -> None:
    result = run(tool("amtool", "prometheus-alertmanager"), "check-config", COMPOSE / "alertmanager.yml")
    assert result.returncode == 0, result.stdout + result.stderr
