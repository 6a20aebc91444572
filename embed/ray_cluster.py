"""Connects to a Ray cluster and decides which of its resources a job takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qembed.errors import MissingExtra, QembedError
from qembed.installation import how_to_install

LOCAL = "local"
AUTH = "RAY_AUTH_MODE"
CONNECT_SECONDS = 10.0
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An empty SETTINGS frame, the first of each side of HTTP/2: length (3 bytes), type, flags, stream (4) (RFC 9113, 4.1)."""
CPUS = 4
"""Default cores of a worker without a GPU."""


@dataclass(frozen=True)
class Share:
    """The job's resources: `workers` actors with `cpus` cores and `gpus` GPUs each; None: as many as the cluster has room for.

    `address` is that of a running cluster, "auto" for the one on this machine, or "local" for one that ends with the job.
    """

    address: str = "auto"
    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None


def check() -> None:
    """Check that Ray is installed.

    Raises:
        MissingExtra: it is not.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--ray needs {error.name}: {how_to_install('ray')}") from error
    assert ray.data


@contextmanager
def connected(share: Share) -> Iterator[None]:
    """A connection to the cluster for the duration of the block; an existing connection is reused and stays open.

    Raises:
        QembedError: no cluster.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    _check_listens(share.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"include_dashboard": False} if share.address == LOCAL else {}
    try:
        ray.init(address=share.address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = " ".join(str(error).split())[:200]
        # Without this setting Ray sends no token to a given address, and reports only "failed to connect".
        hint = "" if share.address == "auto" or AUTH in os.environ else f"; if it asks for a token: {AUTH}=token"
        raise QembedError(f"--ray {share.address}: no Ray cluster there ({reason}){hint}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Check that a gRPC server listens at HOST:PORT: without one Ray retries for a quarter of an hour.

    Addresses in other forms are left to Ray.
    """
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            encrypted = os.environ.get("RAY_USE_TLS", "0") != "0"
            problem = "" if encrypted or _speaks_http2(connection) else "the server there is not Ray"
    except (OSError, OverflowError) as error:
        problem = str(error)
    if problem:
        raise QembedError(f"--ray {address}: no Ray cluster there ({target}: {problem})")


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether a server answers SETTINGS with SETTINGS, as HTTP/2 and hence gRPC servers do (RFC 9113, section 3.4)."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
    head = b""
    while len(head) < len(SETTINGS) and (more := connection.recv(len(SETTINGS))):
        head += more
    return head[3:4] == SETTINGS[3:4]


def resources(share: Share, cluster: Mapping[str, float]) -> tuple[int, dict[str, Any]]:
    """The number of workers, and the resources of each."""
    available = cluster.get("GPU", 0.0)
    gpus = share.gpus if share.gpus is not None else (1.0 if available else 0.0)
    if gpus:
        workers = share.workers or max(1, int(available / gpus))
        return workers, {"num_gpus": gpus, "num_cpus": share.cpus or 1}
    cores = cluster.get("CPU", 1.0)
    cpus = share.cpus or (max(1.0, cores // share.workers) if share.workers else min(float(CPUS), cores))
    return share.workers or max(1, int(cores // cpus)), {"num_cpus": cpus}
