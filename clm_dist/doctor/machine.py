"""CPUs, memory, shared memory and open files of a node, with the limits of its cgroup."""

import contextlib
import os
import re
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clm_dist.config.job import ClusterConfig
from clm_dist.doctor.finding import Finding, error, ok, size, warning
from clm_dist.train.shortage import find_shortage

_GIB, _MIB = 2**30, 2**20
_OBJECT_STORE = 256 * _MIB
"""What the Ray of a run takes of shared memory."""
_WORKER = _GIB
"""About what a worker's Python, torch and Ray take before it has a model."""
_FEW_FILES = 4096
"""Ray itself warns of fewer."""
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a node has; amounts in bytes."""

    host: str
    cpus: int
    """CPUs that Ray counts: those of the machine, or of its container."""
    usable_cpus: float
    """CPUs that this process may use: its affinity, and the quota of its cgroup."""
    available_memory: int
    memory_limit: int | None
    """Of the cgroup; None where it has none."""
    memory_used: int
    """Of that limit."""
    shm: int
    """Size of /dev/shm; 0 where there is none."""
    free_shm: int
    open_files: int
    """The hard limit; Ray raises the soft one to it."""

    @property
    def memory(self) -> int:
        """What a run may take."""
        limited = self.available_memory if self.memory_limit is None else self.memory_limit - self.memory_used
        return max(0, min(self.available_memory, limited))


def read_machine(cgroups: Path = _CGROUPS, own: str | None = None) -> Machine:
    """Look at this node.

    Args:
        cgroups: where the system shows cgroups; `own` is the content of /proc/self/cgroup.
    """
    shm, free_shm = 0, 0
    with contextlib.suppress(OSError):
        shm, _, free_shm = shutil.disk_usage("/dev/shm")
    available = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
    own = Path("/proc/self/cgroup").read_text() if own is None else own
    limit, used = _memory_limit(cgroups, own)
    quota = _cpu_quota(cgroups, own)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray looks at the outermost group, which in a container is its own.
    of_ray = _cpu_quota(cgroups, "0::/") or _cpu_quota(cgroups, "1:cpu:/")
    cpus = max(1, int(min(os.cpu_count() or 1, of_ray or float("inf"))))
    return Machine(
        host=socket.gethostname(),
        cpus=cpus,
        usable_cpus=min(len(os.sched_getaffinity(0)), quota or cpus),
        available_memory=available,
        memory_limit=limit,
        memory_used=used,
        shm=shm,
        free_shm=free_shm,
        open_files=2**31 if most == resource.RLIM_INFINITY else most,
    )


def _groups(root: Path, own: str, controller: str) -> list[Path]:
    """The directories of this process's cgroup and of those that it lies in; limits of all of them hold.

    Args:
        own: content of /proc/self/cgroup.
        controller: `memory` or `cpu`; a directory of its own in version 1.
    """
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            # Mounted by all of their names, in general with a link for each.
            top = root / (controllers if (root / controllers).is_dir() else controller) if controllers else root
            # In a container, the root is that of its own cgroup.
            directory = top / path.strip("/")
            return [directory, *(parent for parent in directory.parents if parent.is_relative_to(top))]
    return []


def _memory_limit(root: Path, own: str) -> tuple[int | None, int]:
    """The limit of which least is left, and what is used of it."""
    found: list[tuple[int, int]] = []
    for group in _groups(root, own, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                found.append((int((group / limit).read_text()), int((group / used).read_text())))
    # Without a limit, version 1 shows a number of the size of the address space.
    limits = [(limit, used) for limit, used in found if limit < 2**60]
    return min(limits, key=lambda one: one[0] - one[1], default=(None, 0))


def _cpu_quota(root: Path, own: str) -> float | None:
    """The smallest quota, in CPUs."""
    found: list[float] = []
    for group in _groups(root, own, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            found += [int(quota) / int(period)] if int(quota) > 0 else []
    return min(found, default=None)


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
