"""Check Kubernetes manifests, on standard input, against schemas, strictly: a field that a schema does not have is an error.

Run with the Python of build/deploy. Kubernetes' own kinds: the package kubernetes-validate, for each version in the arguments.
Prometheus's operator: the models of cloudcoil. KubeRay has no package: `kuberay.json` is the schema of a RayJob, and its
pods are checked as Kubernetes' own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as monitoring

KUBERAY = json.loads(Path(__file__).with_name("kuberay.json").read_text(encoding="utf-8"))


def strict(schema: Any) -> Any:
    """The schema with additional properties forbidden in every object, and without Go's regular expressions.

    A schema in "allOf" only extends another one, so it stays open.
    """
    if isinstance(schema, list):
        return [strict(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: value if name == "allOf" else strict(value) for name, value in schema.items()}
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    if isinstance(pattern := closed.get("pattern"), str) and "(?i)" in pattern[1:]:
        del closed["pattern"]
    return closed


def pods_of(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a RayJob or a RayCluster, as Pods."""
    cluster = job["spec"].get("rayClusterSpec", job["spec"])
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    templates = [group["template"] for group in groups if "template" in group]
    for template in [*templates, *([job["spec"]["submitterPodTemplate"]] if "submitterPodTemplate" in job["spec"] else [])]:
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"],
        }


def check(document: dict[str, Any], versions: list[str]) -> None:
    """Validate a document.

    Raises:
        Exception: it is invalid; each library has its own type.
    """
    group = document["apiVersion"].rpartition("/")[0]
    if group == "monitoring.coreos.com":
        jsonschema.validate(document, strict(getattr(monitoring, document["kind"]).model_json_schema(by_alias=True)))
    elif group == "ray.io":
        jsonschema.validate(document, strict(KUBERAY))
        for pod in pods_of(document):
            check(pod, versions)
    else:
        for version in versions:
            kubernetes_validate.validate(document, version, strict=True)


def main(versions: list[str]) -> int:
    """Print the faults; returns the number of invalid documents."""
    faulty = 0
    for document in yaml.safe_load_all(sys.stdin):
        if document is None:
            continue
        try:
            check(document, versions)
        except Exception as error:  # noqa: BLE001 - three libraries, three kinds of error
            faulty += 1
            where = ".".join(map(str, getattr(error, "path", [])))
            print(f"{document.get('kind')} {document.get('metadata', {}).get('name')}: {where}: {str(error).splitlines()[0]}")
    return faulty


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
