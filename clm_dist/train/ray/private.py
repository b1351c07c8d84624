"""Uses of Ray beyond its interface; tests/test_private_interfaces.py says what an upgrade has moved."""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback

__all__ = [
    "ControllerCallback",
    "WorkerCallback",
    "WorkerGroupCallback",
    "draining_nodes",
    "keep_lost_nodes_quiet",
    "own_error",
    "session_log_dir",
    "tell_of_other_nodes",
]


def keep_lost_nodes_quiet(logger: logging.Logger) -> None:
    """Log what Ray would print: the last lines of a lost node's log, among the results of the run."""

    def log(data: Mapping[str, Any], **options: Any) -> None:
        logger.debug("Ray: %s", "".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log


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


def session_log_dir() -> str | None:
    """Where this process's Ray keeps its logs; None where that is not known."""
    with contextlib.suppress(AttributeError):
        return f"{ray._private.worker._global_node.get_session_dir_path()}/logs"
    return None


def own_error(failure: Exception) -> Exception:
    """The error that a worker raised itself, in the one that Ray Train wraps around it."""
    return getattr(failure, "_base_exc", failure)
