"""Every overlay and job, rendered by kubectl, against schemas, `qembed --help`, and what the server does."""

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
RENDERED = sorted(path.parent for folder in ("overlays", "jobs") for path in HERE.glob(f"{folder}/*/kustomization.yaml"))
SERVING = [folder for folder in RENDERED if folder.parent.name == "overlays"]
CLUSTER = DEPLOY / "ray" / "cluster.yaml"
VERSIONS = ("1.30", "1.37")
QUANTIZE = "qembed-quantize"
LONGEST_PAUSE = max(supervisor.BACK_OFF)


def name(folder: Path) -> str:
    return folder.name


@cache
def rendered(folder: Path) -> str:
    done = run(tool("kubectl", "kubernetes-client, 1.21 or later"), "kustomize", folder)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # warnings: fields that are going away
    return done.stdout


def of(folder: Path, kind: str, called: str = "qembed") -> dict[str, Any]:
    (found,) = [one for one in documents(rendered(folder)) if one["kind"] == kind and one["metadata"]["name"] == called]
    return found


def container(folder: Path, kind: str = "Deployment", called: str = "qembed") -> dict[str, Any]:
    (found,) = of(folder, kind, called)["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.slow
def test_all_that_is_rendered_is_what_kubernetes_takes() -> None:
    together = "\n---\n".join(map(rendered, RENDERED))
    done = run(python(), Path(__file__).with_name("validate.py"), *VERSIONS, input=together)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert len(documents(together)) > 30


def test_every_file_is_part_of_something_that_is_rendered() -> None:
    used: set[Path] = set()

    def follow(folder: Path) -> None:
        file = folder / "kustomization.yaml"
        used.add(file)
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        generated = [one.rpartition("=")[2] for each in said.get("configMapGenerator", []) for one in each["files"]]
        for one in (*said.get("resources", []), *said.get("components", []), *generated):
            path = (folder / one).resolve()
            follow(path) if path.is_dir() else used.add(path)

    for folder in RENDERED:
        follow(folder)
    others = {HERE / "make-secret.sh", HERE / "components/autoscale/adapter-values.yaml"}
    others |= {DEPLOY / "monitoring" / name for name in ("alerts.yaml", "alerts_test.yaml", "alertmanager-values.yaml")}
    standing = {path for top in (HERE, DEPLOY / "monitoring") for path in top.rglob("*") if path.is_file()}
    assert standing == used | others


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_qembed_takes_the_arguments(folder: Path, int4: Path, keys: Path) -> None:
    arguments = container(folder)["args"]
    assert unknown_flags(arguments) == []
    if "--fp16" in arguments:
        assert value_of(arguments, "--model") == value_of(container(HERE / "overlays/gpu")["args"], "--model")
        arguments = ["--int4" if one == "--fp16" else one for one in arguments]
    done = plans(arguments, int4, keys, "--device-memory", "T4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]


def test_quantizing_takes_its_arguments_and_writes_what_is_served() -> None:
    arguments = container(HERE / "jobs/quantize", "Job", "qembed-quantize")["args"]
    assert unknown_flags(arguments) == []
    assert value_of(arguments, "--output") == value_of(container(HERE / "overlays/gpu")["args"], "--model")


def test_embedding_a_corpus_takes_its_arguments_and_reads_what_is_served() -> None:
    words = shlex.split(of(HERE / "jobs/bulk", "RayJob", "qembed-bulk")["spec"]["entrypoint"])
    assert words[:2] == ["qembed", "embed"]
    if not re.search(r"^  embed ", help_of(), re.MULTILINE):
        pytest.skip("this qembed has no `embed`")
    assert unknown_flags(words[1:]) == []
    assert value_of(words, "--model") == value_of(container(HERE / "overlays/gpu")["args"], "--model")
    workers = of(HERE / "jobs/bulk", "RayJob", "qembed-bulk")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert value_of(words, "--ray-workers") == str(sum(group["replicas"] for group in workers))


@pytest.mark.slow
def test_the_cluster_is_what_kuberay_takes() -> None:
    done = run(python(), Path(__file__).with_name("validate.py"), *VERSIONS, input=CLUSTER.read_text(encoding="utf-8"))
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_probes_outlast_a_slow_start_and_a_restart(folder: Path) -> None:
    one = container(folder)
    start = float(value_of(one["args"], "--startup-timeout"))
    seconds = {
        kind: one[f"{kind}Probe"]["periodSeconds"] * one[f"{kind}Probe"]["failureThreshold"] for kind in ("startup", "liveness")
    }
    assert seconds["startup"] > start + 600  # ten minutes for reading the model from a slow volume
    assert seconds["liveness"] > start + LONGEST_PAUSE
    assert of(folder, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds["startup"]
    assert {one[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} == {"/health"}
    assert one["ports"][0]["containerPort"] == int(value_of(one["args"], "--port"))


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_a_pod_has_time_to_answer_what_it_has(folder: Path) -> None:
    one = container(folder)
    drain = float(value_of(one["args"], "--shutdown-timeout"))
    pause = float(one["lifecycle"]["preStop"]["exec"]["command"][1])
    given = of(folder, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert given > pause + drain + supervisor.SERVING_GRACE + shutdown.KILL_GRACE
    rolling = of(folder, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("folder", [*RENDERED, CLUSTER], ids=name)
def test_nothing_runs_as_root_or_writes_to_its_image(folder: Path) -> None:
    found = documents(folder.read_text(encoding="utf-8") if folder.is_file() else rendered(folder))
    templates = [one["spec"]["template"]["spec"] for one in found if one["kind"] in ("Deployment", "Job")]
    cluster = [one["spec"] for one in found if one["kind"] == "RayCluster"]
    cluster += [one["spec"]["rayClusterSpec"] for one in found if one["kind"] == "RayJob"]
    scaled = [one["headGroupSpec"]["template"]["spec"] for one in cluster if one.get("enableInTreeAutoscaling")]
    templates += [group["template"]["spec"] for one in cluster for group in (one["headGroupSpec"], *one["workerGroupSpecs"])]
    assert templates
    for pod in templates:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        asks_kubernetes = any(pod is one for one in scaled)  # for workers
        assert pod.get("serviceAccountName") or pod["automountServiceAccountToken"] is asks_kubernetes
        for one in (*pod["containers"], *pod.get("initContainers", [])):
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert one["securityContext"].get("readOnlyRootFilesystem") or one["name"].startswith("ray-")  # Ray writes at home
            assert "memory" in one["resources"]["limits"]
            mounted = {mount["name"] for mount in one["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]}


def test_each_claim_is_there_and_has_a_size() -> None:
    found = [one for folder in RENDERED for one in documents(rendered(folder))]
    sizes = {
        one["metadata"]["name"]: one["spec"]["resources"]["requests"]["storage"]
        for one in found
        if one["kind"] == "PersistentVolumeClaim"
    }
    assert set(re.findall(r"claimName: (\S+)", "\n".join(map(rendered, RENDERED)))) == set(sizes)


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_replicas_wait_for_the_checkpoint_that_the_job_writes(folder: Path) -> None:
    pod = of(folder, "Deployment")["spec"]["template"]["spec"]
    (waiting,) = pod["initContainers"]
    served = value_of(container(folder)["args"], "--model")
    assert waiting["command"][-1] == served == value_of(container(HERE / "jobs/quantize", "Job", QUANTIZE)["args"], "--output")
    assert waiting["image"] == container(folder)["image"]
    assert waiting["volumeMounts"][0]["mountPath"] == str(Path(served).parent)


def test_the_init_container_ends_when_the_checkpoint_is_complete(tmp_path: Path) -> None:
    pod = yaml.safe_load((HERE / "base/deployment.yaml").read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    *command, _ = pod["initContainers"][0]["command"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([*command, tmp_path], timeout=1, capture_output=True)
    (tmp_path / "config.json").write_text("{}")
    assert subprocess.run([*command, tmp_path], timeout=60).returncode == 0


def test_quantizing_on_cpus_asks_for_no_card() -> None:
    on_gpu, on_cpu = (container(HERE / "jobs" / job, "Job", QUANTIZE) for job in ("quantize", "quantize-cpu"))
    assert "nvidia.com/gpu" not in str(on_cpu["resources"])
    assert "nvidia.com/gpu" in str(on_gpu["resources"])
    assert (on_gpu["image"], on_cpu["image"]) == ("qembed:gpu", "qembed:cpu")
    assert on_cpu["args"] == on_gpu["args"]


def test_the_volume_is_for_several_nodes_or_all_replicas_are_on_one() -> None:
    for folder in SERVING:
        pod = of(folder, "Deployment")["spec"]["template"]["spec"]
        modes = of(folder, "PersistentVolumeClaim", "qembed-models")["spec"]["accessModes"]
        if folder.name == "one-node":
            assert modes == ["ReadWriteOnce"]
            (rule,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "kubernetes.io/hostname"
            assert (
                rule["labelSelector"]["matchLabels"].items()
                <= of(folder, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
            )
        else:
            assert modes == ["ReadWriteMany"]
            assert "affinity" not in pod


def test_with_a_gpu_and_without() -> None:
    assert container(HERE / "overlays/gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(HERE / "overlays/gpu")["image"] == "qembed:gpu"
    assert "nvidia.com/gpu" not in container(HERE / "overlays/cpu")["resources"]["limits"]
    assert container(HERE / "overlays/cpu")["image"] == "qembed:cpu"
    assert "--fp16" in container(HERE / "overlays/fp16")["args"]
    assert "--int4" in container(HERE / "overlays/gpu")["args"]


@pytest.mark.parametrize("folder", SERVING, ids=name)
def test_selectors_find_their_pods(folder: Path) -> None:
    found = documents(rendered(folder))
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in found if one["kind"] == "Deployment"]
    for one in found:
        wanted = {
            "Service": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "Deployment": lambda spec: spec["selector"]["matchLabels"],
        }.get(one["kind"])
        if wanted:
            assert sum(wanted(one["spec"]).items() <= each.items() for each in labels) == 1, one["metadata"]["name"]


def test_the_autoscaler_asks_for_what_the_adapter_makes() -> None:
    scaler = of(HERE / "overlays/gpu", "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in of(HERE / "overlays/gpu", "Deployment")["spec"]
    assert scaler["scaleTargetRef"]["name"] == of(HERE / "overlays/gpu", "Deployment")["metadata"]["name"]
    (rule,) = yaml.safe_load((HERE / "components/autoscale/adapter-values.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    (metric,) = scaler["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series)
    assert {"<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"} <= set(re.findall(r"<<[.\w]+>>", rule["metricsQuery"]))


def test_prometheus_finds_the_servers_and_has_their_key() -> None:
    found = HERE / "overlays/gpu"
    monitor = of(found, "ServiceMonitor")["spec"]
    service = of(found, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "qembed"  # the job that the alerts are for
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    secret = documents(run(HERE / "make-secret.sh").stdout)[0] if tool("kubectl") else {}
    volumes = of(found, "Deployment")["spec"]["template"]["spec"]["volumes"]
    (mounted,) = [one["secret"] for one in volumes if "secret" in one]
    assert mounted["secretName"] == secret["metadata"]["name"] == endpoint["authorization"]["credentials"]["name"]
    assert {mounted["items"][0]["key"], endpoint["authorization"]["credentials"]["key"]} == set(secret["data"])


def test_the_rules_for_the_operator_are_those_of_prometheus() -> None:
    rule = yaml.safe_load((DEPLOY / "monitoring/prometheus_rule.yaml").read_text(encoding="utf-8"))
    assert rule["spec"]["groups"] == yaml.safe_load((DEPLOY / "monitoring/alerts.yaml").read_text(encoding="utf-8"))["groups"]


def test_the_secret_holds_keys_that_qembed_takes_and_never_the_same(tmp_path: Path) -> None:
    import base64

    from qembed.vllm import api_keys

    tool("kubectl", "kubernetes-client")
    made = [run(HERE / "make-secret.sh") for _ in range(2)]
    assert made[0].returncode == 0, made[0].stderr
    first, second = (documents(one.stdout)[0]["data"] for one in made)
    assert set(first.values()).isdisjoint(second.values())
    file = tmp_path / "keys"
    file.write_bytes(base64.b64decode(first["keys"]))
    found = api_keys.find(file, {})
    assert len(found) == 2
    assert base64.b64decode(first["metrics"]).decode() in found
