"""The workflow and the issue templates for GitHub name commands that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"


def read(name: str) -> dict[str, object]:
    document = yaml.safe_load((GITHUB / name).read_text())
    assert isinstance(document, dict)
    return document


def test_each_step_of_the_workflow_is_a_target_of_the_makefile() -> None:
    targets = re.findall(r"(?:run: |sudo )make (\S+)", (GITHUB / "workflows" / "ci.yml").read_text())
    assert {"lint", "test-fast", "test", "test-autoawq", "image"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_workflow_has_a_time_limit_for_each_job_and_only_reads() -> None:
    workflow = read("workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert isinstance(jobs, dict)
    assert all(job["timeout-minutes"] <= 90 for job in jobs.values())


@pytest.mark.parametrize("template", ["bug.yml", "measurement.yml"])
def test_issues_come_with_what_doctor_says(template: str) -> None:
    body = read(f"ISSUE_TEMPLATE/{template}")["body"]
    assert isinstance(body, list)
    required = [field for field in body if field.get("validations", {}).get("required")]
    assert any("qembed doctor --json" in field["attributes"]["label"] for field in required)
