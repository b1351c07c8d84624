"""What a machine has: CPUs, memory, shared memory and open files, with the limits of this process's cgroup."""

import contextlib
import os
import re
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

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
                found.append((int((group / limit).read_text()), int((group / used).read_text()) - _old_files(group)))
    # Without a limit, version 1 shows a number of the size of the address space.
    limits = [(limit, used) for limit, used in found if limit < 2**60]
    return min(limits, key=lambda one: one[0] - one[1], default=(None, 0))


def _old_files(group: Path) -> int:
    """Bytes of files that a group read or wrote a while ago: they count as used, and are given up for anything else."""
    with contextlib.suppress(OSError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Version 1 has those of the groups inside under another name.
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return 0


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
