"""Every overlay and job, rendered by kubectl, against schemas, `qembed --help` and the server's behaviour."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from qembed.vllm import shutdown, supervisor
from tests.deploy.tools import DEPLOY, documents, help_of, plans, python, run, tool, unknown_flags, value_of

HERE = DEPLOY / "kubernetes"
FOLDERS = sorted(path.parent for folder in ("overlays", "jobs") for path in HERE.glob(f"{folder}/*/kustomization.yaml"))
SERVING = [folder for folder in FOLDERS if folder.parent.name == "overlays"]
CLUSTER = DEPLOY / "ray" / "cluster.yaml"
VERSIONS = ("1.30", "1.37")
QUANTIZE = "qembed-quantize"
LONGEST_PAUSE = max(supervisor.BACK_OFF)


def name(folder: Path) -> str:
    return folder.name


@cache
def render(folder: Path) -> str:
    result = run(tool("kubectl", "kubernetes-client, 1.21 or later"), "kustomize", folder)
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr  # warnings: fields that are going away
    return result.stdout


def manifest(folder: Path, kind: str, object_name: str = "qembed") -> dict[str, Any]:
    (document,) = [
        document
        for document in documents(render(folder))
        if document["kind"] == kind and document["metadata"]["name"] == object_name
    ]
    return document


def container(folder: Path, kind: str = "Deployment", object_name: str = "qembed") -> dict[str, Any]:
    (only,) = manifest(folder, kind, object_name)["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.slow
def test_rendered_manifests_are_valid() -> None:
    manifests = "\n---\n".join(map(render, FOLDERS))
    result = run(python(), Path(__file__).with_name("validate.py"), *VERSIONS, input=manifests)
    assert (result.stdout, result.returncode) == ("", 0), result.stderr
    assert len(documents(manifests)) > 30


def test_every_file_is_part_of_a_rendered_overlay_or_job() -> None:
    used: set[Path] = set()

    def follow(folder: Path) -> None:
        file = folder / "kustomization.yaml"
        used.add(file)
        kustomization = yaml.safe_load(file.read_text(encoding="utf-8"))
        generated_from = [
            name.rpartition("=")[2] for generator in kustomization.get("configMapGenerator", []) for name in generator["files"]
        ]
        for name in (*kustomization.get("resources", []), *kustomization.get("components", []), *generated_from):
            path = (folder / name).resolve()
            follow(path) if path.is_dir() else used.add(path)

    for folder in FOLDERS:
        follow(folder)
    unreferenced = {HERE / "make-secret.sh", HERE / "components/autoscale/adapter-values.yaml"}
    unreferenced |= {DEPLOY / "monitoring" / name for name in ("alerts.yaml", "alerts_test.yaml", "alertmanager-values.yaml")}
    files = {path for top in (HERE, DEPLOY / "monitoring") for path in top.rglob("*") if path.is_file()}
    assert files == used | unreferenced


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_qembed_accepts_the_arguments(folder: Path, int4: Path, keys: Path) -> None:
    arguments = container(folder)["args"]
    assert unknown_flags(arguments) == []
    if "--fp16" in arguments:
        assert value_of(arguments, "--model") == value_of(container(HERE / "overlays/gpu")["args"], "--model")
        arguments = ["--int4" if argument == "--fp16" else argument for argument in arguments]
    result = plans(arguments, int4, keys, "--device-memory", "T4")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["fits"]


def test_the_quantize_job_has_valid_arguments_and_writes_the_served_checkpoint() -> None:
    arguments = container(HERE / "jobs/quantize", "Job", "qembed-quantize")["args"]
    assert unknown_flags(arguments) == []
    assert value_of(arguments, "--output") == value_of(container(HERE / "overlays/gpu")["args"], "--model")


def test_the_bulk_job_has_valid_arguments_and_reads_the_served_checkpoint() -> None:
    words = shlex.split(manifest(HERE / "jobs/bulk", "RayJob", "qembed-bulk")["spec"]["entrypoint"])
    assert words[:2] == ["qembed", "embed"]
    if not re.search(r"^  embed ", help_of(), re.MULTILINE):
        pytest.skip("this qembed has no `embed`")
    assert unknown_flags(words[1:]) == []
    assert value_of(words, "--model") == value_of(container(HERE / "overlays/gpu")["args"], "--model")
    workers = manifest(HERE / "jobs/bulk", "RayJob", "qembed-bulk")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert value_of(words, "--ray-workers") == str(sum(group["replicas"] for group in workers))


@pytest.mark.slow
def test_the_ray_cluster_is_valid() -> None:
    result = run(python(), Path(__file__).with_name("validate.py"), *VERSIONS, input=CLUSTER.read_text(encoding="utf-8"))
    assert (result.stdout, result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_probes_outlast_a_slow_start_and_a_restart(folder: Path) -> None:
    server = container(folder)
    start = float(value_of(server["args"], "--startup-timeout"))
    seconds = {
        kind: server[f"{kind}Probe"]["periodSeconds"] * server[f"{kind}Probe"]["failureThreshold"]
        for kind in ("startup", "liveness")
    }
    assert seconds["startup"] > start + 600  # plus ten minutes to read the model from a slow volume
    assert seconds["liveness"] > start + LONGEST_PAUSE
    assert manifest(folder, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds["startup"]
    assert {server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} == {"/health"}
    assert server["ports"][0]["containerPort"] == int(value_of(server["args"], "--port"))


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_a_pod_has_time_to_finish_its_requests(folder: Path) -> None:
    server = container(folder)
    drain = float(value_of(server["args"], "--shutdown-timeout"))
    pause = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_seconds = manifest(folder, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_seconds > pause + drain + supervisor.SERVING_GRACE + shutdown.KILL_GRACE
    rolling = manifest(folder, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("folder", [*FOLDERS, CLUSTER], ids=name)
def test_nothing_runs_as_root_or_writes_to_its_image(folder: Path) -> None:
    manifests = documents(folder.read_text(encoding="utf-8") if folder.is_file() else render(folder))
    templates = [item["spec"]["template"]["spec"] for item in manifests if item["kind"] in ("Deployment", "Job")]
    cluster = [item["spec"] for item in manifests if item["kind"] == "RayCluster"]
    cluster += [item["spec"]["rayClusterSpec"] for item in manifests if item["kind"] == "RayJob"]
    autoscaled_heads = [item["headGroupSpec"]["template"]["spec"] for item in cluster if item.get("enableInTreeAutoscaling")]
    templates += [group["template"]["spec"] for item in cluster for group in (item["headGroupSpec"], *item["workerGroupSpecs"])]
    assert templates
    for pod in templates:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        asks_kubernetes = any(pod is head for head in autoscaled_heads)  # the autoscaler starts workers
        assert pod.get("serviceAccountName") or pod["automountServiceAccountToken"] is asks_kubernetes
        for container_spec in (*pod["containers"], *pod.get("initContainers", [])):
            assert container_spec["securityContext"]["allowPrivilegeEscalation"] is False
            assert container_spec["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            is_ray = container_spec["name"].startswith("ray-")  # Ray writes to its home folder
            assert container_spec["securityContext"].get("readOnlyRootFilesystem") or is_ray
            assert "memory" in container_spec["resources"]["limits"]
            mounts = {mount["name"] for mount in container_spec["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}


def test_each_claim_exists_and_has_a_size() -> None:
    manifests = [item for folder in FOLDERS for item in documents(render(folder))]
    sizes = {
        item["metadata"]["name"]: item["spec"]["resources"]["requests"]["storage"]
        for item in manifests
        if item["kind"] == "PersistentVolumeClaim"
    }
    assert set(re.findall(r"claimName: (\S+)", "\n".join(map(render, FOLDERS)))) == set(sizes)


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_replicas_wait_for_the_checkpoint_that_the_job_writes(folder: Path) -> None:
    pod = manifest(folder, "Deployment")["spec"]["template"]["spec"]
    (waiting,) = pod["initContainers"]
    model = value_of(container(folder)["args"], "--model")
    assert waiting["command"][-1] == model == value_of(container(HERE / "jobs/quantize", "Job", QUANTIZE)["args"], "--output")
    assert waiting["image"] == container(folder)["image"]
    assert waiting["volumeMounts"][0]["mountPath"] == str(Path(model).parent)


def test_the_init_container_ends_when_the_checkpoint_is_complete(tmp_path: Path) -> None:
    pod = yaml.safe_load((HERE / "base/deployment.yaml").read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    *command, _ = pod["initContainers"][0]["command"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([*command, tmp_path], timeout=1, capture_output=True)
    (tmp_path / "config.json").write_text("{}")
    assert subprocess.run([*command, tmp_path], timeout=60).returncode == 0


def test_quantizing_on_cpus_requests_no_gpu() -> None:
    on_gpu, on_cpu = (container(HERE / "jobs" / job, "Job", QUANTIZE) for job in ("quantize", "quantize-cpu"))
    assert "nvidia.com/gpu" not in str(on_cpu["resources"])
    assert "nvidia.com/gpu" in str(on_gpu["resources"])
    assert (on_gpu["image"], on_cpu["image"]) == ("qembed:gpu", "qembed:cpu")
    assert on_cpu["args"] == on_gpu["args"]


def test_the_volume_is_shared_between_nodes_or_all_replicas_run_on_one() -> None:
    for folder in SERVING:
        pod = manifest(folder, "Deployment")["spec"]["template"]["spec"]
        modes = manifest(folder, "PersistentVolumeClaim", "qembed-models")["spec"]["accessModes"]
        if folder.name == "one-node":
            assert modes == ["ReadWriteOnce"]
            (rule,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "kubernetes.io/hostname"
            assert (
                rule["labelSelector"]["matchLabels"].items()
                <= manifest(folder, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
            )
        else:
            assert modes == ["ReadWriteMany"]
            assert "affinity" not in pod


def test_overlays_request_a_gpu_or_none_and_the_matching_image() -> None:
    assert container(HERE / "overlays/gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(HERE / "overlays/gpu")["image"] == "qembed:gpu"
    assert "nvidia.com/gpu" not in container(HERE / "overlays/cpu")["resources"]["limits"]
    assert container(HERE / "overlays/cpu")["image"] == "qembed:cpu"
    assert "--fp16" in container(HERE / "overlays/fp16")["args"]
    assert "--int4" in container(HERE / "overlays/gpu")["args"]


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_selectors_find_their_pods(folder: Path) -> None:
    manifests = documents(render(folder))
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in manifests if item["kind"] == "Deployment"]
    for item in manifests:
        selector_of = {
            "Service": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "Deployment": lambda spec: spec["selector"]["matchLabels"],
        }.get(item["kind"])
        if selector_of:
            assert sum(selector_of(item["spec"]).items() <= pod_labels.items() for pod_labels in labels) == 1, item["metadata"][
                "name"
            ]


def test_the_autoscaler_uses_the_metric_that_the_adapter_provides() -> None:
    scaler = manifest(HERE / "overlays/gpu", "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in manifest(HERE / "overlays/gpu", "Deployment")["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifest(HERE / "overlays/gpu", "Deployment")["metadata"]["name"]
    (rule,) = yaml.safe_load((HERE / "components/autoscale/adapter-values.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    (metric,) = scaler["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series)
    assert {"<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"} <= set(re.findall(r"<<[.\w]+>>", rule["metricsQuery"]))


def test_the_service_monitor_selects_the_servers_and_has_their_key() -> None:
    folder = HERE / "overlays/gpu"
    monitor = manifest(folder, "ServiceMonitor")["spec"]
    service = manifest(folder, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "qembed"  # the job that the alerts are for
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    secret = documents(run(HERE / "make-secret.sh").stdout)[0] if tool("kubectl") else {}
    volumes = manifest(folder, "Deployment")["spec"]["template"]["spec"]["volumes"]
    (secret_volume,) = [volume["secret"] for volume in volumes if "secret" in volume]
    assert secret_volume["secretName"] == secret["metadata"]["name"] == endpoint["authorization"]["credentials"]["name"]
    assert {secret_volume["items"][0]["key"], endpoint["authorization"]["credentials"]["key"]} == set(secret["data"])


def test_the_operators_rules_equal_those_of_prometheus() -> None:
    rule = yaml.safe_load((DEPLOY / "monitoring/prometheus_rule.yaml").read_text(encoding="utf-8"))
    assert rule["spec"]["groups"] == yaml.safe_load((DEPLOY / "monitoring/alerts.yaml").read_text(encoding="utf-8"))["groups"]


def test_each_secret_holds_new_keys_that_qembed_accepts(tmp_path: Path) -> None:
    import base64

    from qembed.vllm import api_keys

    tool("kubectl", "kubernetes-client")
    results = [run(HERE / "make-secret.sh") for _ in range(2)]
    assert results[0].returncode == 0, results[0].stderr
    first, second = (documents(result.stdout)[0]["data"] for result in results)
    assert set(first.values()).isdisjoint(second.values())
    file = tmp_path / "keys"
    file.write_bytes(base64.b64decode(first["keys"]))
    accepted = api_keys.find(file, {})
    assert len(accepted) == 2
    assert base64.b64decode(first["metrics"]).decode() in accepted
