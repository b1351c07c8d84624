"""Whether a node has what its workers take: CPUs, memory, shared memory and open files."""

from collections.abc import Iterator, Mapping

from clm_dist.config.job import ClusterConfig
from clm_dist.doctor.finding import Finding, error, ok, size, warning
from clm_dist.machine import Machine
from clm_dist.train.shortage import find_shortage

_GIB, _MIB = 2**30, 2**20
_OBJECT_STORE = 256 * _MIB
"""What the Ray of a run takes of shared memory."""
_WORKER = _GIB
"""About what a worker's Python, torch and Ray take before it has a model."""
_FEW_FILES = 4096
"""Ray itself warns of fewer."""


def judge_machine(found: Machine, cpus_each: float, *, num_workers: int) -> Iterator[Finding]:
    """The findings of one node.

    Args:
        num_workers: how many workers it has at least.
    """
    problems = [*_judge_memory(found, num_workers), *_judge_limits(found)]
    wanted = num_workers * cpus_each
    if found.usable_cpus < min(wanted, found.cpus):
        problems.append(
            warning(
                "machine",
                f"this process may use {found.usable_cpus:g} of {found.cpus} CPUs (affinity or cgroup), and "
                f"{num_workers} x cluster.cpus_per_worker {cpus_each:g} take {wanted:g}",
                "the threads of the workers share fewer CPUs than they expect, and wait for each other",
                f"ask for {wanted:g} CPUs, or set cluster.cpus_per_worker to "
                f"{found.usable_cpus / num_workers:.3g} or less",
            )
        )
    yield from problems
    if not problems:
        limit = "" if found.memory_limit is None else f" (of a limit of {size(found.memory_limit)})"
        yield ok(
            "machine",
            f"{found.usable_cpus:g} CPUs, {size(found.memory)} of memory free{limit}, "
            f"{size(found.free_shm)} of /dev/shm, {found.open_files:,} open files",
        )


def _judge_memory(found: Machine, num_workers: int) -> Iterator[Finding]:
    if found.memory < num_workers * _WORKER:
        limit = "" if found.memory_limit is None else f"; its cgroup has a limit of {size(found.memory_limit)}"
        yield warning(
            "machine",
            f"{size(found.memory)} of memory are free, for {num_workers} workers{limit}",
            "a worker takes about 1 GiB before it has a model; the system kills what takes more than there is",
            "ask for more memory, end what uses it, or lower cluster.workers",
        )
    if found.free_shm < _OBJECT_STORE:
        yield warning(
            "machine",
            f"{size(found.free_shm)} of {size(found.shm)} of /dev/shm are free",
            "Ray keeps its object store there, 256 MiB, and puts it on a disk where it has less; NCCL passes data "
            "between the GPUs of a node through it, and fails",
            "docker run --shm-size=2g; in a pod, an emptyDir of medium Memory at /dev/shm; else remove old files there",
        )


def _judge_limits(found: Machine) -> Iterator[Finding]:
    if found.open_files < _FEW_FILES:
        yield warning(
            "machine",
            f"a process may have {found.open_files:,} files open (ulimit -Hn)",
            "Ray opens a connection for each worker, and fails where it has none left",
            "raise the hard limit: nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536:65536",
        )


def judge_amounts(nodes: Mapping[str, Mapping[str, float]], cluster: ClusterConfig, where: str) -> Iterator[Finding]:
    """Whether the fewest workers of a job fit on the nodes.

    Args:
        nodes: what each node has, `{"CPU": 8.0, "GPU": 1.0}`.
        where: what the nodes are, for the message.
    """
    has_gpus = any(amounts.get("GPU") for amounts in nodes.values())
    gpus_each = int(has_gpus) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if short := find_shortage(cluster, gpus_each, list(nodes.values())):
        fewer = f"set cluster.workers to {short.fitting} or less, or " if short.fitting else ""
        yield error(
            "gpus" if short.kind == "GPU" else "machine",
            short.describe(where),
            "the run is refused, or its workers wait for what never comes",
            f"{fewer}ask for more {short.kind}s",
        )
