"""The Ray that a run uses: started or joined, its resources, and what is done to its nodes and workers."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clm_dist.config import ClusterConfig
from clm_dist.errors import ConfigError

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_S = 15


@dataclass(frozen=True)
class Cluster:
    """The Ray that the run uses."""

    num_gpus_per_worker: int


@contextlib.contextmanager
def start_ray(cluster: ClusterConfig) -> Iterator[Cluster]:
    """The Ray of RAY_ADDRESS, or one of this process's own that ends with it; a running one is used as it is.

    Raises:
        ConfigError: it has fewer CPUs or GPUs than the job's workers take.
    """
    for name, value in {
        # Reports reach the driver within this time; Ray's own 2 s would hold up short runs.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        # "local" starts a Ray; nothing at all would join one that happens to run here.
        options = {} if address else {"include_dashboard": False, "object_store_memory": 256 * 2**20}
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Workers speak through reports; what else they print stays in Ray's log files, which errors name.
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(_check_resources(cluster, nodes, local=own and "RAY_ADDRESS" not in os.environ))
    finally:
        if own:
            ray.shutdown()


def _check_resources(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], *, local: bool) -> int:
    """GPUs of a worker. Raises ConfigError where the workers would wait for resources that never come.

    Args:
        nodes: what each node has, `{"CPU": 8.0, "GPU": 1.0}`.
    """
    where = "this machine" if local else "the Ray cluster"
    num_gpus = sum(node.get("GPU", 0) for node in nodes)
    gpus_each = int(num_gpus > 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    workers = cluster.min_workers
    for kind, each in (("GPU", gpus_each), ("CPU", cluster.cpus_per_worker)):
        # A worker lies on one node.
        fitting = sum(int(node.get(kind, 0) // each) for node in nodes) if each else workers
        if fitting < workers:
            available = sum(node.get(kind, 0) for node in nodes)
            advice = [f"set cluster.workers to {fitting} or less"] if fitting else []
            if kind == "CPU" and available:
                advice.append(f"set cluster.cpus_per_worker to {available / workers:.3g} or less")
            spread = f" on {len(nodes)} nodes, which fit {fitting} workers" if len(nodes) > 1 else ""
            raise ConfigError(
                f"cluster.workers {workers} x {each:g} {kind} need {workers * each:g}, {where} has "
                f"{available:g}{spread}; " + " or ".join(advice or [f"use a cluster with {kind}s"]),
                field="cluster.workers",
            )
    return gpus_each


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray is about to give up, because of a preemption for example."""
    return set(ray._private.state.state.get_draining_nodes())


def alive_nodes() -> frozenset[str]:
    """Ids of the nodes that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def this_node() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def kill_worker(node: str, pid: int) -> None:
    """End a worker's process with SIGKILL, on whatever node it is; also one that is stopped and hears nothing."""

    def kill() -> None:
        with contextlib.suppress(OSError):
            # The process may be gone, and its number another's.
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(kill).options(scheduling_strategy=there)
    try:
        ray.get(task.remote(), timeout=_KILL_TIMEOUT_S)
    except Exception as error:  # the node may be gone, and its workers with it
        logger.debug("worker %d on node %s could not be killed", pid, node, exc_info=error)


def tell_of_other_nodes() -> None:
    """Let Ray Train see at once which nodes there are; by itself it looks every 20 s, and waits for gone ones."""
    with contextlib.suppress(Exception):  # no part of Ray's interface, and a delay where it is another
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("clm-dist", recompute=True), timeout=5)


def log_dir() -> str:
    try:
        return f"{ray._private.worker._global_node.get_session_dir_path()}/logs"
    except AttributeError:
        return "Ray's session directory on the nodes"
