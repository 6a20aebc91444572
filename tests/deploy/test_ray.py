"""The files for KubeRay are consistent YAML and name the Ray version that is tested here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY = ROOT / "deploy" / "ray"


def ray_version() -> str:
    match = re.search(r"^ray==(.+)$", (ROOT / "deploy" / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    assert match
    return match[1]


@pytest.mark.parametrize("file", ["ray/cluster.yaml", "kubernetes/jobs/bulk/rayjob.yaml"])
def test_head_and_workers_share_image_ray_and_volumes(file: str) -> None:
    (manifest,) = yaml.safe_load_all((RAY.parent / file).read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["rayVersion"] == ray_version()
    pods = [spec["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in spec["workerGroupSpecs"])]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) <= {volume["name"] for volume in pod["volumes"]}
        assert mounts["data"] == "/data"


def test_the_image_has_the_same_ray() -> None:
    assert f"FROM rayproject/ray:{ray_version()}-py311-gpu" in (RAY / "Dockerfile").read_text()
