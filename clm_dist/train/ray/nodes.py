"""The driver's watch over nodes that are drained, lost, or not there yet, or whose resources others hold."""

import logging
import time
from collections.abc import Set

from clm_dist.config.job import JobConfig
from clm_dist.config.ray_address import expected_nodes
from clm_dist.errors import NotReadyError, RunError
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Progress
from clm_dist.train.ray.cluster import (
    Cluster,
    alive_nodes,
    this_node,
)
from clm_dist.train.ray.holders import describe_holders
from clm_dist.train.ray.private import draining_nodes, tell_of_other_nodes
from clm_dist.train.shortage import find_shortage

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_HOLDERS_S = 5.0
"""How often Ray is asked who holds what the workers wait for."""
_SAVE_BEFORE_S = 15.0
"""How long before a node is taken away the second checkpoint is saved."""


class NodeWatch:
    """The driver's eye on the nodes."""

    def __init__(self, job: JobConfig, run: RunDir, cluster: Cluster, progress: Progress) -> None:
        self._job, self._run, self._cluster, self._progress = job, run, cluster, progress
        self._looked = -float("inf")
        self._alive: Set[str] = alive_nodes().keys()
        self._used: Set[str] = frozenset()
        self._drained: set[str] = set()
        self._saves: list[float] = []
        self._worked = time.monotonic()
        self._waits = False
        self._asked = time.monotonic()
        self._held: str | None = None
        self._told: str | None = None

    def look(self, used: Set[str]) -> None:
        """Do what is to be done now.

        Args:
            used: the nodes on which workers are; none while they are started.

        Raises:
            RunError: workers did not begin to train within `train.start_timeout_s`; NotReadyError under a scheduler.
        """
        if time.monotonic() - self._looked < _INTERVAL_S:
            return
        self._looked = time.monotonic()
        alive, draining = alive_nodes(), draining_nodes()
        if alive.keys() != self._alive and self._job.cluster.elastic:
            tell_of_other_nodes()
        for node in self._used & self._alive - alive.keys():
            self._progress.note(f"The node {node[:8]} is gone, and the workers on it")
        self._alive, self._used = alive.keys(), used or self._used
        self._heed_drains(draining, used)
        if used:
            self._worked = self._asked = time.monotonic()
            self._waits, self._held, self._told = False, None, None
        else:
            self._wait([resources for node, resources in alive.items() if node not in draining])

    def _heed_drains(self, draining: dict[str, int], used: Set[str]) -> None:
        own, now = this_node(), time.time()
        new = draining.keys() & (used | {own}) - self._drained
        self._drained |= new
        for node in new:
            # The driver cannot go on without its own.
            goes_on = self._job.cluster.elastic and node != own
            then = "going on with the other nodes" if goes_on else "then stopping"
            self._progress.note(f"Ray drains the node {node[:8]} (preempted?): saving a checkpoint, {then}")
            (self._run.save if goes_on else self._run.stop).touch()
            # Ray Train goes on with all workers until the node is taken away; what they do after a save is lost then.
            if goes_on and (again := draining[node] / 1000 - _SAVE_BEFORE_S) > now:
                self._saves.append(again)
        if any(at <= now for at in self._saves):
            self._saves = [at for at in self._saves if at > now]
            self._run.save.touch()

    def _wait(self, nodes: list[dict[str, float]]) -> None:
        timeout_s = self._job.train.start_timeout_s
        shortage = find_shortage(self._job.cluster, self._cluster.num_gpus_per_worker, nodes)
        most = "" if timeout_s is None else f", for {timeout_s:g} s at most (train.start_timeout_s)"
        if shortage and not self._waits:
            self._waits = True
            self._progress.note(f"Waiting for nodes: {shortage.describe()}{most}")
        if not shortage:
            self._ask_for_holders(most)
        if timeout_s is not None and time.monotonic() - self._worked > timeout_s:
            held = None if shortage else self._told
            why = shortage.describe() if shortage else held or "the resources of the Ray cluster may be in use"
            # Under a scheduler the same job may get other nodes, and others may end.
            raise (NotReadyError if expected_nodes() or held else RunError)(
                f"no worker began to train within train.start_timeout_s ({timeout_s:g} s): {why}. The committed "
                "checkpoints are whole; the same command goes on from the last"
            )

    def _ask_for_holders(self, most: str) -> None:
        """Tell who holds what the workers wait for, where it stays so, and again when it changes."""
        if time.monotonic() - self._asked < _HOLDERS_S:
            return
        self._asked = time.monotonic()
        before, self._held = self._held, None
        try:
            self._held = describe_holders(self._job.cluster, self._cluster.num_gpus_per_worker)
        except Exception as error:  # Ray may be away for a moment; the wait must end all the same
            logger.debug("Ray did not say who holds its resources", exc_info=error)
        if not self._held and not before:
            self._told = None
        if self._held and before and self._held != self._told:
            self._told = self._held
            self._progress.note(f"Waiting for resources: {self._held}{most}")
