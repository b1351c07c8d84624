"""Ray on one host of a Slurm job: `python -m clm_dist.submit.slurm.ray_node STATE ATTEMPT`, one task a host.

It limits Ray to what Slurm granted. It restarts a node that dies, except the head, which the other nodes cannot do
without. When the attempt ends, it leaves no process and no local file; Ray's logs are kept in STATE.

The batch script sets RAY_ADDRESS and the token. STATE/attempt holds the number of the attempt that runs. This node
ends when the file names another attempt or says that this one has ended, even on a host that Slurm cannot reach.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clm_dist.config.ray_address import host_and_port
from clm_dist.submit.ray_settings import RAY_SETTINGS, address_towards, answers, end_descendants, interface_of

_POLL_S = 1.0
_MIB = 2**20
_LAST_LINES = 8
_PR_SET_CHILD_SUBREAPER = 36
# With these set, frameworks would treat each worker as a task of srun.
_OF_A_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID")


def granted(environment: Mapping[str, str], *, available_mib: int, shm_mib: int) -> dict[str, int]:
    """Options of `ray start` for what Slurm granted on this host: CPUs, GPUs, memory and object store in bytes.

    Args:
        available_mib: memory of the host, used if Slurm granted all of it.
        shm_mib: free space of /dev/shm, which holds the object store.
    """
    cpus = int(environment.get("SLURM_CPUS_PER_TASK") or environment["SLURM_CPUS_ON_NODE"])
    memory = int(environment.get("SLURM_MEM_PER_NODE") or 0)
    memory = memory or int(environment.get("SLURM_MEM_PER_CPU") or 0) * cpus
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    memory = memory or int(environment.get("SLURM_MEM_PER_GPU") or 0) * gpus or available_mib
    # Blocks come from files, not from the object store. Ray needs a store of 75 MiB or more.
    store = max(80, min(1024, memory // 5, shm_mib * 8 // 10))
    return {
        "num-cpus": cpus,
        "num-gpus": gpus,
        "memory": (memory - store) * _MIB,
        "object-store-memory": store * _MIB,
    }


def _in_words(amounts: Mapping[str, int]) -> str:
    memory, store = amounts["memory"] // _MIB, amounts["object-store-memory"] // _MIB
    return f"{amounts['num-cpus']} CPUs, {amounts['num-gpus']} GPUs, {memory} MiB and {store} MiB of object store"


class RayNode:
    """The Ray node of this host.

    Args:
        state: the directory of the run's submission.
        attempt: the job's number, and how often it was requeued: `1234.0`.
    """

    def __init__(self, state: Path, attempt: str, environment: Mapping[str, str]) -> None:
        self._state, self._attempt = state, attempt
        self._is_head = environment["SLURM_NODEID"] == "0"
        self._address = environment["RAY_ADDRESS"]
        head = host_and_port(self._address)
        assert head is not None, "the batch script writes it"
        self._head = head
        self._host = socket.gethostname()
        # A short and local path, because Ray's sockets lie there.
        self._local = Path(f"/tmp/clm-dist-job-{attempt}")
        self._of_driver = Path(f"{self._local}-driver")
        self._environment = environment
        self._told = False

    def run(self) -> int:
        """Run Ray until the attempt ends, and return the exit code of the task."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        # Orphaned processes become children of this process, which ends them.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._make_local()
        try:
            return self._keep()
        finally:
            end_descendants()
            self._keep_logs()
            for directory in (self._local, self._of_driver):
                shutil.rmtree(directory, ignore_errors=True)

    def _keep(self) -> int:
        while not self._is_over():
            if not self._is_head and not self._head_answers():
                time.sleep(_POLL_S)
                continue
            amounts = self._granted()
            place = "the head" if self._is_head else f"a node of {self._address}"
            self._say(f"starting Ray, {place}, with {_in_words(amounts)}")
            said = self._local / "ray-start.txt"
            with said.open("wb") as file:
                ray = subprocess.Popen(self._command(amounts), stdout=file, stderr=file, env=self._ray_environment())
            while ray.poll() is None and not self._is_over():
                time.sleep(_POLL_S)
            if self._is_over():
                break
            last = said.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            self._say("\n".join([f"Ray has ended with {ray.returncode}; the last that it said:", *last]))
            end_descendants()
            if self._is_head:
                # The other nodes cannot join without a head.
                if not self._is_over():
                    (self._state / "attempt").write_text(f"{self._attempt} ended\n")
                return 1
            time.sleep(_POLL_S)
        self._say("the end")
        return 0

    def _is_over(self) -> bool:
        """Whether this node must end: by a signal, by the script, or because a later attempt has begun."""
        if not self._told:
            # Storage that is away for a moment, or a file that is being written, must not end a run.
            with contextlib.suppress(OSError):
                self._told = (self._state / "attempt").read_text().strip() not in ("", self._attempt)
        return self._told

    def _end(self, _number: int, _frame: Any) -> None:
        self._told = True

    def _head_answers(self) -> bool:
        return answers(*self._head)

    def _granted(self) -> dict[str, int]:
        free_shm = shutil.disk_usage("/dev/shm").free // _MIB
        # Includes the file cache, which the system frees on demand.
        available = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) // 1024
        return granted(self._environment, available_mib=available, shm_mib=free_shm)

    def _command(self, amounts: Mapping[str, int]) -> list[str]:
        host, port = self._head
        place = ["--head", f"--port={port}", "--include-dashboard=false"]
        if importlib.util.find_spec("grpc"):
            # With grpc, Ray also serves clients, by default at the same port for all jobs of a host. Without grpc it
            # refuses the option.
            place.append(f"--ray-client-server-port={port + 1}")
        if not self._is_head:
            place = [f"--address={self._address}"]
        own = host if self._is_head else address_towards(host)
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            # A free one: for the port that it else has, a node waits seconds if another job's Ray is on the host.
            "--dashboard-agent-listen-port=0",
            *place,
            f"--node-ip-address={own}",
            f"--temp-dir={self._local}",
            *(f"--{name}={amount}" for name, amount in amounts.items()),
        ]

    def _ray_environment(self) -> dict[str, str]:
        environment = {**RAY_SETTINGS, **self._environment, "TMPDIR": str(self._local)}
        if interface := interface_of(address_towards(self._head[0])):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environment.setdefault(name, interface)
        return {name: value for name, value in environment.items() if name not in _OF_A_TASK}

    def _make_local(self) -> None:
        for directory in Path("/tmp").glob("clm-dist-job-*[0-9]"):
            _remove_unless_in_use(directory)
        while not self._is_locked():
            self._local.mkdir(mode=0o700)
        (self._state / "nodes").mkdir(exist_ok=True)

    def _is_locked(self) -> bool:
        """Lock the directory until this process ends; false if it does not exist.

        Without a lock, another job of this user that starts on the host would remove it as left over.
        """
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(self._local, os.O_RDONLY | os.O_NOFOLLOW)
            # Where /tmp has no locks, no job can remove what another left, so this directory needs none.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            held = os.fstat(handle)
            # A directory of another user is not used, and mkdir raises an error.
            if held.st_uid == os.getuid() and os.path.samestat(held, self._local.stat()):
                return True
            os.close(handle)
        return False

    def _keep_logs(self) -> None:
        logs = self._local / "session_latest" / "logs"
        with contextlib.suppress(OSError, shutil.Error):  # a full disk must not prevent the removal of local files
            shutil.copytree(logs, self._state / "nodes" / self._host / self._attempt, dirs_exist_ok=True)

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} attempt {self._attempt}: {text}\n"
        path = self._state / "nodes" / f"{self._host}.log"
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as log:  # a full disk ends nothing
            log.write(line)


def _remove_unless_in_use(directory: Path) -> None:
    """Remove local files that a killed job of this user left, or a power cut."""
    with contextlib.suppress(OSError):  # in use, or another process was quicker
        handle = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_uid == os.getuid():
                shutil.rmtree(directory)
                shutil.rmtree(f"{directory}-driver")
        finally:
            os.close(handle)


if __name__ == "__main__":
    sys.exit(RayNode(Path(sys.argv[1]), sys.argv[2], os.environ).run())
