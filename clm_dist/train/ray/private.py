"""Uses of Ray beyond its interface; tests/test_private_interfaces.py says what an upgrade has moved."""

import atexit
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import node, parameter, ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # it is compiled
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

__all__ = [
    "ControllerCallback",
    "LeanTrainer",
    "WorkerCallback",
    "WorkerGroupCallback",
    "abandon",
    "draining_nodes",
    "forget_token",
    "in_a_session_of_its_own",
    "keep_lost_nodes_quiet",
    "lost_process",
    "on_loopback",
    "own_error",
    "session_log_dir",
    "tell_of_other_nodes",
    "without_services",
]


def keep_lost_nodes_quiet(logger: logging.Logger) -> None:
    """Log what Ray would print: the last lines of a lost node's log, among the results of the run."""

    def log(data: Mapping[str, Any], **options: Any) -> None:
        logger.debug("Ray: %s", "".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log


def forget_token() -> None:
    """Let Ray read its variables about tokens again: it keeps what it has read once in a process."""
    # In this order: with tokens on, a thread that asks for one between the two would end the process.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started take 127.0.0.1 for this node's address, and listen there alone."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def without_services() -> Iterator[None]:
    """Let a Ray that is started have no API server, no monitor of an autoscaler and no monitor of logs.

    Its agent takes a port that is free: Ray waits three seconds for a fixed one that another Ray has, or had.
    """
    before = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = partial(
        parameter.RayParams, dashboard_agent_listen_port=0, include_log_monitor=False, no_monitor=True
    )
    node.Node.start_api_server = _name_no_api_server
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = before


def _name_no_api_server(started: Any, **options: Any) -> None:
    """Write down an address where nobody answers: what asks for the API server would wait for one to be written."""
    key, namespace = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
    started.get_gcs_client().internal_kv_put(key, b"127.0.0.1:9", True, namespace=namespace)


@contextlib.contextmanager
def in_a_session_of_its_own() -> Iterator[None]:
    """Let a Ray that is started not have the signals of this process's terminal and group."""
    before = services.ConsolePopen
    services.ConsolePopen = partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before


def draining_nodes() -> dict[str, int]:
    """The nodes that Ray is about to give up, because of a preemption for example, and when.

    That is in ms since the epoch, or 0 if Ray was not told.
    """
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes


def tell_of_other_nodes() -> None:
    """Let Ray Train see at once which nodes there are; by itself it looks every 20 s, and waits for lost ones."""
    with contextlib.suppress(Exception):  # only a delay where it is missing
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("clm-dist", recompute=True), timeout=5)


class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # Ray is not typed
    """A TorchTrainer without what Ray Data would need, and without what has nothing to do in a Ray of this process.

    Each would be a process more that the start of workers waits for.

    Args:
        alone: whether Ray ends with this process and has all the nodes that the run can get.
    """

    def __init__(self, *arguments: Any, alone: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner gives back what a driver that was killed had reserved.
        without = (DatasetsCallback, PlacementGroupCleanerCallback) if self._alone else DatasetsCallback
        return [one for one in super()._create_default_callbacks() if not isinstance(one, without)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if self._alone:
            settings["scaling_policy"] = _AsItIs(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _AsItIs(FixedScalingPolicy):  # type: ignore[misc]  # Ray is not typed
    """A policy that tells no autoscaler what the workers take."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def lost_process() -> str | None:
    """Which of the two processes that Ray cannot do without has ended, of a Ray that this process started."""
    own = ray._private.worker._global_node
    started = own.all_processes if own else {}
    for name in ("gcs_server", "raylet"):
        if any(info.process.poll() is not None for info in started.get(name, ())):
            return name
    return None


def abandon() -> None:
    """End what is left of a Ray that has ended. `ray.shutdown` would end this process.

    This process cannot use Ray any more, and has to end by `os._exit`: see `ClmDistError.ends_process`.
    """
    atexit.unregister(ray.shutdown)
    if (own := ray._private.worker._global_node) is None:
        return
    started = {info.process.pid for infos in own.all_processes.values() for info in infos}
    own.kill_all_processes(check_alive=False, allow_graceful=False)
    # Its agents would wait a minute for it to come back. They are in the sessions of what started them.
    for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
        with contextlib.suppress(OSError):
            if os.getsid(pid) in started:
                os.kill(pid, signal.SIGKILL)


def session_log_dir() -> str | None:
    """Where this process's Ray keeps its logs; None where that is not known."""
    with contextlib.suppress(AttributeError):
        return f"{ray._private.worker._global_node.get_session_dir_path()}/logs"
    return None


def own_error(failure: Exception) -> Exception:
    """The error that a worker raised itself, in those that Ray and Ray Train wrap around it."""
    while inner := getattr(failure, "_base_exc", None) or getattr(failure, "cause", None):
        failure = inner
    return failure
