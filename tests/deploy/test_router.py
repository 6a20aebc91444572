"""vLLM's router, with the arguments of its Deployment, before two stand-ins for qembed."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qembed.vllm import ports
from qembed.vllm.settings import MAX_BODY
from tests.answering import Request, Server
from tests.deploy.test_kubernetes import HERE, container
from tests.deploy.tools import PYTHON, python, run, value_of

pytestmark = pytest.mark.slow

ROUTER = PYTHON.with_name("vllm-router")
KEY = "Bearer a-key-for-tests"
DISCOVERY = ("--service-discovery", "--selector", "app.kubernetes.io/")


def arguments() -> list[str]:
    return list(container(HERE / "overlays/router", object_name="qembed-router")["args"])


class Replica(Server):
    """Answers 200 to requests with the key, or 503 while `full`; `bodies` are the requests received."""

    def __init__(self) -> None:
        self.full = False
        self.bodies: list[dict[str, Any]] = []
        super().__init__(self.answer)

    def answer(self, request: Request) -> tuple[int, object]:
        if not request.body:
            return 200, {}
        if request.headers["authorization"] != KEY:
            return 401, {"error": {"message": "no key"}}
        self.bodies.append(request.body)
        return 503 if self.full else 200, {"data": []}


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    servers = [Replica(), Replica()]
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def router(replicas: list[Replica], tmp_path: Path) -> Iterator[int]:
    """The port of a router before both replicas."""
    python()
    port = ports.free("127.0.0.1")
    options = [
        option
        for option in arguments()
        if not option.startswith(DISCOVERY) and not option.startswith(("--host", "--port", "--prometheus"))
    ]
    addresses = ["--host=127.0.0.1", f"--port={port}", f"--prometheus-port={ports.free('127.0.0.1')}"]
    with (tmp_path / "log").open("w") as log:
        command = [ROUTER, *options, *addresses, "--worker-urls", *(replica.url for replica in replicas)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while ask(port, "GET", "/readiness") != 200:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str = "POST", path: str = "/v1/embeddings", key: str | None = KEY, **more: object) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"model": "m", "input": ["text"], **more}) if method == "POST" else None
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **({"Authorization": key} if key else {})})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def test_each_flag_is_one_of_the_routers() -> None:
    python()
    flags = run(ROUTER, "--help").stdout
    for argument in arguments():
        if argument.startswith("--"):
            assert argument.partition("=")[0] in flags.split(), argument
    assert int(value_of(arguments(), "--max-payload-size")) == MAX_BODY
    router_container = container(HERE / "overlays/router")
    assert value_of(arguments(), "--service-discovery-port") == value_of(router_container["args"], "--port")


def test_it_finds_the_pods_of_qembed_and_may_do_so() -> None:
    from tests.deploy.test_kubernetes import manifest

    folder = HERE / "overlays/router"
    labels = manifest(folder, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selector = dict(argument.split("=") for argument in arguments() if argument.startswith("app.kubernetes.io/"))
    assert selector == labels
    (rule,) = manifest(folder, "Role", "qembed-router")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    (subject,) = manifest(folder, "RoleBinding", "qembed-router")["subjects"]
    assert subject["name"] == manifest(folder, "Deployment", "qembed-router")["spec"]["template"]["spec"]["serviceAccountName"]
    assert subject["namespace"] == "qembed"
    (source, *_) = manifest(folder, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert (
        source["podSelector"]["matchLabels"].items()
        <= manifest(folder, "Deployment", "qembed-router")["spec"]["template"]["metadata"]["labels"].items()
    )


def test_no_request_is_lost_while_one_replica_is_full_or_gone(router: int, replicas: list[Replica]) -> None:
    assert ask(router, key=None) == 401  # keys are the replicas' to check
    assert [ask(router) for _ in range(20)] == [200] * 20
    assert all(replica.bodies for replica in replicas)
    replicas[0].full = True
    before = len(replicas[0].bodies)
    assert [ask(router) for _ in range(100)] == [200] * 100
    assert len(replicas[0].bodies) < before + 50  # without a circuit breaker, half of all tries would reach it: 100 of 200
    replicas[0].full = False
    before = len(replicas[0].bodies)
    deadline = time.monotonic() + 60
    while len(replicas[0].bodies) < before + 5:  # it gets requests again soon
        assert ask(router) == 200
        assert time.monotonic() < deadline
    replicas[0].end()
    assert [ask(router) for _ in range(20)] == [200] * 20


def test_a_bad_request_leaves_no_replica_out(router: int, replicas: list[Replica]) -> None:
    for _ in range(20):
        assert ask(router, key=None) == 401
    before = [len(replica.bodies) for replica in replicas]
    assert [ask(router) for _ in range(20)] == [200] * 20
    assert all(len(replica.bodies) > count for replica, count in zip(replicas, before, strict=True))


def test_it_drops_what_openai_does_not_have(router: int, replicas: list[Replica]) -> None:
    """docs/deploy.md warns of it: such queries would be embedded without their instruction."""
    assert (
        ask(router, dimensions=64, encoding_format="base64", prompt_name="query", instruction="find", truncate_prompt_tokens=9)
        == 200
    )
    (body,) = [body for replica in replicas for body in replica.bodies]
    assert body["dimensions"] == 64
    assert not {"prompt_name", "instruction"} & set(body)
