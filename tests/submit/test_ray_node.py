"""Ray's node on a host: what it gives Ray, when it starts again, and that it leaves nothing."""

import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clm_dist.submit.slurm import ray_node
from clm_dist.submit.slurm.ray_node import RayNode, granted
from tests.conftest import ROOT
from tests.support.processes import running

MIB = 2**20
_WAIT_S = 20


@pytest.mark.parametrize(
    ("environment", "cpus", "gpus", "memory_mib"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "64"}, 4, 0, 9000),
        ({"SLURM_CPUS_ON_NODE": "64"}, 64, 0, 9000),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "3000"}, 4, 0, 3000),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_CPU": "500"}, 4, 0, 2000),
        # --mem=0 is all that the host has.
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "0"}, 4, 0, 9000),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, 4, 8, 9000),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "2", "SLURM_MEM_PER_GPU": "800"}, 4, 2, 1600),
        # Of whoever submitted it.
        ({"SLURM_CPUS_PER_TASK": "4", "CUDA_VISIBLE_DEVICES": "0,3"}, 4, 0, 9000),
    ],
)
def test_ray_gets_what_slurm_granted(environment: dict[str, str], cpus: int, gpus: int, memory_mib: int) -> None:
    amounts = granted(environment, available_mib=9000, shm_mib=10_000)
    assert (amounts["num-cpus"], amounts["num-gpus"]) == (cpus, gpus)
    assert amounts["memory"] + amounts["object-store-memory"] == memory_mib * MIB
    assert amounts["object-store-memory"] == min(1024, memory_mib // 5) * MIB


def test_the_object_store_fits_the_memory_that_holds_it() -> None:
    amounts = granted({"SLURM_CPUS_PER_TASK": "1"}, available_mib=9000, shm_mib=64)
    # Ray refuses less than 75 MiB.
    assert amounts["object-store-memory"] == 80 * MIB


# Says how it was called, leaves logs and a process that has left it, and works until it is told to fail.
_RAY = """
import json, os, subprocess, sys, time
from pathlib import Path
here = Path(os.environ["FAKE_RAY"])
number = len(list(here.glob("call-*")))
options = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
logs = Path(options["temp-dir"]) / "session_latest" / "logs"
logs.mkdir(parents=True, exist_ok=True)
(logs / "raylet.out").write_text("raylet")
daemon = subprocess.Popen(["sleep", "300"], start_new_session=True)
call = {"argv": sys.argv[1:], "daemon": daemon.pid, "pid": os.getpid(), "environment": dict(os.environ)}
(here / "part").write_text(json.dumps(call))
(here / "part").rename(here / f"call-{number}")
while not (here / f"fail-{number}").exists():
    time.sleep(0.05)
print("\\n".join(f"line {n}" for n in range(20)))
sys.exit(3)
"""


@dataclass
class Node:
    """A node in a process of its own, with a Ray that does as it is told."""

    state: Path
    fake: Path
    address: str
    job_id: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def local(self) -> Path:
        return Path(f"/tmp/clm-dist-job-{self.job_id}.0")

    @property
    def log(self) -> str:
        return (self.state / "nodes" / f"{socket.gethostname()}.log").read_text()

    @property
    def logs(self) -> Path:
        """Ray's own, which are kept."""
        return self.state / "nodes" / socket.gethostname() / f"{self.job_id}.0"

    def start(self, number: int = 0) -> subprocess.Popen[bytes]:
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "attempt").write_text(f"{self.job_id}.0\n")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.fake}:{ROOT}",
            "FAKE_RAY": str(self.fake),
            "RAY_ADDRESS": self.address,
            "SLURM_NODEID": str(number),
            "SLURM_JOB_ID": self.job_id,
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_PROCID": str(number),
            "SLURM_NTASKS": "2",
        }
        command = [sys.executable, "-m", "clm_dist.submit.slurm.ray_node", str(self.state), f"{self.job_id}.0"]
        self.processes.append(subprocess.Popen(command, env=environment))
        return self.processes[-1]

    def call(self, number: int = 0) -> dict[str, object]:
        """How Ray was called, once it is."""
        path = self.fake / f"call-{number}"
        wait_for(path.exists)
        found: dict[str, object] = json.loads(path.read_text())
        return found

    def fail(self, number: int) -> None:
        (self.fake / f"fail-{number}").touch()

    def check_nothing_is_left(self, calls: int = 1) -> None:
        assert not self.local.exists()
        assert running([int(str(self.call(n)[who])) for n in range(calls) for who in ("pid", "daemon")]) == []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """A port of this host at which nobody listens, yet."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


@pytest.fixture
def node(tmp_path: Path, port: socket.socket) -> Iterator[Node]:
    scripts = tmp_path / "fake" / "ray" / "scripts"
    scripts.mkdir(parents=True)
    for package in (scripts.parent, scripts):
        (package / "__init__.py").touch()
    (scripts / "scripts.py").write_text(_RAY)
    address = f"127.0.0.1:{port.getsockname()[1]}"
    made = Node(tmp_path / "it's the state", tmp_path / "fake", address, f"test-{os.getpid()}")
    yield made
    for process in made.processes:
        process.terminate()
        process.wait(_WAIT_S)


def test_the_head_is_given_what_was_granted_on_a_port_of_the_job_s(node: Node) -> None:
    node.start()
    call = node.call()
    argv, environment = call["argv"], call["environment"]
    assert isinstance(argv, list)
    assert isinstance(environment, dict)
    port = node.address.rpartition(":")[2]
    assert argv[:2] == ["start", "--block"]
    assert {"--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={node.local}"} <= set(argv)
    assert {"--num-cpus=3", "--num-gpus=0", "--include-dashboard=false"} <= set(argv)
    assert not [option for option in argv if option.startswith("--address")]
    assert (environment["TMPDIR"], environment["GLOO_SOCKET_IFNAME"]) == (str(node.local), "lo")
    assert not {"SLURM_PROCID", "SLURM_NTASKS"} & environment.keys()
    assert node.local.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["ended", "later attempt", "SIGTERM"])
def test_a_node_that_is_to_end_leaves_nothing_but_logs(node: Node, how: str) -> None:
    process = node.start()
    node.call()
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        (node.state / "attempt").write_text("ended\n" if how == "ended" else f"{node.job_id}.1\n")
    assert process.wait(_WAIT_S) == 0
    node.check_nothing_is_left()
    assert (node.logs / "raylet.out").read_text() == "raylet"
    assert node.log.splitlines()[-1].endswith(f"attempt {node.job_id}.0: the end")


def test_a_head_that_fails_ends_the_attempt_and_says_what_ray_said(node: Node) -> None:
    process = node.start()
    node.call()
    node.fail(0)
    assert process.wait(_WAIT_S) == 1
    assert (node.state / "attempt").read_text() == f"{node.job_id}.0 ended\n"
    node.check_nothing_is_left()
    said = node.log.splitlines()
    assert said[0].endswith(" MiB and 1024 MiB of object store")
    assert ": starting Ray, the head, with 3 CPUs, 0 GPUs, " in said[0]
    assert said[1].endswith(": Ray has ended with 3; the last that it said:")
    assert said[2:] == [f"line {n}" for n in range(12, 20)]


def test_another_node_waits_for_the_head_and_starts_again_after_ray_ends(node: Node, port: socket.socket) -> None:
    process = node.start(1)
    wait_for(node.local.exists)
    time.sleep(1.5)
    assert not (node.fake / "call-0").exists()
    port.listen()
    argv = node.call(0)["argv"]
    assert isinstance(argv, list)
    assert f"--address={node.address}" in argv
    assert "--head" not in argv
    node.fail(0)
    first, second = node.call(0), node.call(1)
    assert running([int(str(first["daemon"]))]) == []
    assert running([int(str(second["pid"]))]) != []
    assert (node.state / "attempt").read_text() == f"{node.job_id}.0\n"
    (node.state / "attempt").write_text("ended\n")
    assert process.wait(_WAIT_S) == 0
    node.check_nothing_is_left(2)
    assert node.log.count(f": starting Ray, a node of {node.address}, with 3 CPUs") == 2


def test_a_node_whose_storage_is_away_for_a_moment_goes_on(node: Node) -> None:
    process = node.start()
    node.call()
    (node.state / "attempt").unlink()
    time.sleep(1.5)
    assert process.poll() is None
    # As a writer leaves it for a moment.
    (node.state / "attempt").write_text("")
    time.sleep(1.5)
    assert process.poll() is None
    (node.state / "attempt").write_text("ended\n")
    assert process.wait(_WAIT_S) == 0


def test_what_killed_jobs_left_is_removed_but_not_what_is_in_use(node: Node, tmp_path: Path) -> None:
    killed, used = (Path(f"/tmp/clm-dist-job-{node.job_id}-{number}.0") for number in (1, 2))
    for directory in (killed, Path(f"{killed}-driver"), used):
        directory.mkdir()
        (directory / "old").touch()
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        process = node.start()
        node.call()
        assert (killed.exists(), Path(f"{killed}-driver").exists(), used.exists()) == (False, False, True)
        process.send_signal(signal.SIGTERM)
        process.wait(_WAIT_S)
        node.check_nothing_is_left()
    finally:
        os.close(handle)
        shutil.rmtree(used)


def test_a_node_finds_its_head_by_ipv6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        address = f"[::1]:{server.getsockname()[1]}"
        node = RayNode(tmp_path, "1.0", {"SLURM_NODEID": "1", "RAY_ADDRESS": address})
        assert node._head_answers()
        assert {f"--address={address}", "--node-ip-address=::1"} <= set(node._command({}))
        assert node._ray_environment()["GLOO_SOCKET_IFNAME"] == "lo"
        head = RayNode(tmp_path, "1.0", {"SLURM_NODEID": "0", "RAY_ADDRESS": address})
        assert {f"--port={server.getsockname()[1]}", "--node-ip-address=::1"} <= set(head._command({}))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_host_whose_tmp_has_no_locks_runs_jobs_and_removes_nothing_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    node = RayNode(tmp_path, "1.0", {"SLURM_NODEID": "0", "RAY_ADDRESS": "127.0.0.1:20012"})
    node._local = tmp_path / "job"
    assert not node._is_locked()
    node._local.mkdir()
    assert node._is_locked()
    ray_node._remove_unless_in_use(node._local)
    assert node._local.exists()


def test_a_log_that_cannot_be_written_ends_no_node(node: Node) -> None:
    (node.state / "nodes" / f"{socket.gethostname()}.log").mkdir(parents=True)
    process = node.start()
    node.call()
    (node.state / "attempt").write_text("ended\n")
    assert process.wait(_WAIT_S) == 0
    node.check_nothing_is_left()


@pytest.mark.parametrize(("spec", "has_option"), [(None, False), ("grpc", True)])
def test_clients_have_a_port_of_the_job_s_where_ray_serves_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str | None, has_option: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    environment = {"SLURM_NODEID": "0", "RAY_ADDRESS": "127.0.0.1:20012"}
    command = RayNode(tmp_path, "1.0", environment)._command({})
    assert ("--ray-client-server-port=20013" in command) == has_option
    worker = RayNode(tmp_path, "1.0", environment | {"SLURM_NODEID": "1"})._command({})
    assert not [option for option in worker if option.startswith(("--ray-client", "--port", "--head"))]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory another user's")
def test_a_directory_that_another_user_made_is_not_used(node: Node) -> None:
    node.local.mkdir()
    os.chown(node.local, 65534, 65534)
    process = node.start()
    try:
        assert process.wait(_WAIT_S) == 1
        assert not (node.fake / "call-0").exists()
        assert list(node.local.iterdir()) == []
    finally:
        node.local.rmdir()
