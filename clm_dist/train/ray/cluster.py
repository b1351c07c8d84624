"""The Ray that a run uses: started or joined, its resources, and what is done to its nodes and workers."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clm_dist.config.job import ClusterConfig
from clm_dist.config.ray_address import check_ray_address, expected_nodes, no_ray
from clm_dist.errors import ConfigError, NotReadyError, first_line
from clm_dist.train.ray import private
from clm_dist.train.ray.gpus import check_gpus
from clm_dist.train.ray.own import own_ray, parting
from clm_dist.train.shortage import find_shortage

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_S = 15
_NODES_TIMEOUT_S = 300
"""Within this time a Ray that is started beside the driver has its nodes."""
_POLL_S = 0.5
_POLL_WORKER_S = 0.001


@dataclass(frozen=True)
class Cluster:
    """The Ray that the run uses."""

    num_gpus_per_worker: int
    is_own: bool = False
    """Whether it was started for this process alone, and so has all the nodes that it will have."""


def poll_interval_s(num_workers: int) -> float:
    """Seconds from one question of Ray's controller to all workers to the next.

    It asks each of them, and a process makes some 3,500 such calls a second, on two cores: 1,024 workers could not be
    asked every 0.2 s.
    """
    return max(0.2, num_workers * _POLL_WORKER_S)


@contextlib.contextmanager
def start_ray(cluster: ClusterConfig, logs: Path | None = None) -> Iterator[Cluster]:
    """The Ray of RAY_ADDRESS, or one of this process's own that ends with it; a running one is used as it is.

    Args:
        logs: where the logs of one of its own are kept if the run fails.

    Raises:
        ConfigError: no Ray is at that address, or it has fewer CPUs or GPUs than the job's workers take.
        NotReadyError: it does not start; or it is started beside this process (CLM_DIST_NODES), and its nodes do not
            come.
    """
    for name, value in {
        # Reports reach the driver within this time; Ray's own 2 s would hold up short runs.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{poll_interval_s(cluster.max_workers):g}",
        # After a loss it asks for as many workers as before until Ray knows of the loss, and only then for fewer.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    is_own = not (address or ray.is_initialized())
    if ray.is_initialized():
        using: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        logging.getLogger("ray").setLevel(logging.ERROR)
        private.keep_lost_nodes_quiet(logger)
        # Workers speak through reports; what else they print stays in Ray's log files, which errors name.
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        # Without an address, Ray would join one that happens to run here.
        using = _joined(address, cluster, quiet) if address else own_ray(logs, object_store_memory=256 * 2**20, **quiet)
    with using:
        nodes = alive_nodes()
        gpus_each = _check_resources(cluster, list(nodes.values()), local=not address)
        if gpus_each:
            check_gpus([node for node, resources in nodes.items() if resources.get("GPU")])
        yield Cluster(gpus_each, is_own=is_own)


@contextlib.contextmanager
def starting_ray(cluster: ClusterConfig, logs: Path | None = None) -> Iterator[Callable[[], Cluster]]:
    """Begin to start this process's own Ray in a thread; what is yielded waits for it, as `start_ray` does.

    Most of the start is other processes' work, so the caller checks its job meanwhile. A Ray of RAY_ADDRESS is joined
    where it is asked for, because its nodes may take minutes to come. Either ends with the context.
    """
    # The thread outlives Ray, which would wait 15 seconds at its end for the one that started it.
    with ThreadPoolExecutor(1, thread_name_prefix="starting-ray") as thread, contextlib.ExitStack() as started:
        begin = partial(started.enter_context, start_ray(cluster, logs))
        if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
            yield begin
            return
        starting, is_asked_for = thread.submit(begin), False

        def ask() -> Cluster:
            nonlocal is_asked_for
            is_asked_for = True
            return starting.result()

        try:
            yield ask
        except BaseException:
            _await(starting)
            if not is_asked_for:
                # Its logs tell nothing of what was raised.
                started.close()
            raise
        _await(starting)


def _await(starting: Future[Cluster]) -> None:
    """Wait for a start through all interrupts: what has begun can be ended only when it is there."""
    while not starting.done():
        with contextlib.suppress(KeyboardInterrupt):
            wait([starting])


@contextlib.contextmanager
def _joined(address: str, cluster: ClusterConfig, options: Mapping[str, Any]) -> Iterator[None]:
    private.forget_token()
    if expected := expected_nodes():
        _join_once_there(address, expected, options, elastic=cluster.elastic)
    else:
        check_ray_address(address)
        try:
            ray.init(address=address, **options)
        except ValueError as error:
            raise no_ray(address, first_line(error)) from None
        except ConnectionError as error:
            problem = "(one that asks for a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)"
            raise no_ray(address, f"{first_line(error)} {problem}") from None
    with parting():
        yield


def _join_once_there(address: str, num_nodes: int, options: Mapping[str, Any], *, elastic: bool) -> None:
    """Join a Ray that is being started, when it has all its nodes; elastic workers begin without the late ones."""
    deadline = time.monotonic() + _NODES_TIMEOUT_S
    while True:
        try:
            check_ray_address(address)
            if not ray.is_initialized():
                ray.init(address=address, **options)
            found = len(alive_nodes())
            problem = f"it has {found} of {num_nodes} nodes"
            if found >= num_nodes or (elastic and time.monotonic() > deadline):
                return
        except (ConfigError, ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            problem = first_line(error)
        if time.monotonic() > deadline:
            raise NotReadyError(
                f"the Ray at {address} is not complete after {_NODES_TIMEOUT_S} s: {problem}; its nodes' logs say why"
            )
        time.sleep(_POLL_S)


def _check_resources(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], *, local: bool) -> int:
    """GPUs of a worker. Raises ConfigError where the workers would wait for resources that never come.

    Args:
        nodes: what each node has, `{"CPU": 8.0, "GPU": 1.0}`.
    """
    where = "this machine" if local else "the Ray cluster"
    num_gpus = sum(node.get("GPU", 0) for node in nodes)
    gpus_each = int(num_gpus > 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if found := find_shortage(cluster, gpus_each, nodes):
        advice = [f"set cluster.workers to {found.fitting} or less"] if found.fitting else []
        if found.kind == "CPU" and found.available:
            advice.append(f"set cluster.cpus_per_worker to {found.available / cluster.min_workers:.3g} or less")
        raise ConfigError(
            f"{found.describe(where)}; " + " or ".join(advice or [f"use a cluster with {found.kind}s"]),
            field="cluster.workers",
        )
    return gpus_each


def alive_nodes() -> dict[str, dict[str, float]]:
    """The nodes that are there, and what each has."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


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
