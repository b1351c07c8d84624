"""A real Slurm cluster for drills, and a job that is submitted to it.

The cluster is `../shared/slurm/slurm-cluster`: several hosts of namespaces on one machine. It is started here with
state and addresses of its own, and with hosts files in which a host's own name is 127.0.1.1, as Debian has it.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from clm_dist.config.load import load_job
from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.conftest import ROOT, tiny_job, write_corpus
from tests.support.runs import RunView

PROGRAM = ROOT.parent / "shared" / "slurm" / "slurm-cluster"
TIMEOUT_S = 240
# torch tells its own process, which is the tests', where it compiles; jobs would take it for a user's wish.
_NOT_THE_USERS = ("RAY_ADDRESS", "TORCHINDUCTOR_CACHE_DIR")


class Slurm:
    """A Slurm cluster of this drill's own.

    Args:
        directory: not below /tmp, which its hosts do not share.
    """

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if name not in _NOT_THE_USERS} | {
            "SLURM_CLUSTER_STATE": "/run/clmdrill",
            "SLURM_CLUSTER_SUBNET": "10.213.79",
            "SLURM_CLUSTER_BRIDGE": "clmdrill0",
            "SLURM_CLUSTER_CTLD_PORT": "6827",
            "SLURM_CLUSTER_DEBIAN_HOSTS": "1",
            "SLURM_CLUSTER_SHARED": str(ROOT) if str(ROOT).startswith("/tmp/") else "",
            "SLURM_CONF": "/run/clmdrill/etc/slurm.conf",
        }
        self.call("up", str(num_nodes))

    def call(self, *arguments: str) -> str:
        """What `slurm-cluster` says. Raises CalledProcessError."""
        return self.ask(str(PROGRAM), *arguments)

    def ask(self, *command: str) -> str:
        """What a command of the cluster says. Raises CalledProcessError."""
        pipe = subprocess.PIPE
        ended = subprocess.run(command, env=self.environment, cwd=self.directory, stdout=pipe, text=True, timeout=120)
        ended.check_returncode()
        return ended.stdout

    def processes(self, node: str, pattern: str) -> list[int]:
        """Processes on a node, by its own numbers, whose command lines match."""
        lines = self.call("exec", node, "ps", "-eo", "pid=,args=", "-ww").splitlines()
        return [int(line.split()[0]) for line in lines if re.search(pattern, line.partition(" ")[2])]

    def kill(self, node: str, pattern: str) -> None:
        pids = self.processes(node, pattern)
        assert pids, f"no {pattern} on {node}"
        self.call("exec", node, "kill", "-9", *map(str, pids))

    def leavings(self) -> list[str]:
        """What jobs left on the nodes: processes and files."""
        found = []
        for node in self.nodes:
            pids = self.processes(node, "ray::|raylet|gcs_server|clm_dist|ray start")
            files = self.call("exec", node, "find", "/tmp", "/dev/shm", "-mindepth", "1", "-maxdepth", "1")
            # Where the repository is below /tmp, its directory is shared.
            found += [f"{node}: process {pid}" for pid in pids]
            found += [f"{node}: {file}" for file in files.splitlines() if Path(file) not in ROOT.parents]
        return found

    def wait_clean(self) -> None:
        """Wait until jobs that have ended have left nothing; fail where they leave something for good."""
        deadline = time.monotonic() + 30
        while found := self.leavings():
            assert time.monotonic() < deadline, found
            time.sleep(0.5)

    def down(self) -> None:
        self.call("down")


@contextlib.contextmanager
def a_cluster(num_nodes: int = 3) -> Iterator[Slurm]:
    directory = Path(tempfile.mkdtemp(prefix="clm-dist drill's ", dir="/var/tmp"))
    directory.chmod(0o755)
    slurm = Slurm(directory, num_nodes)
    try:
        yield slurm
    finally:
        slurm.down()
        shutil.rmtree(directory)


class SlurmJob(RunView):
    """The tiny job, as `clm-dist submit slurm` gives it to the cluster."""

    def __init__(self, slurm: Slurm, name: str, settings: Sequence[str], *, user: int | None = None) -> None:
        self.slurm = slurm
        self.directory = slurm.directory / name
        self.directory.mkdir()
        self._environment = dict(slurm.environment)
        job = self.directory / "tiny.yaml"
        job.write_text(yaml.safe_dump(tiny_job(write_corpus(self.directory))))
        job.write_text(yaml.safe_dump(load_job(job, [*settings, "name=tiny"]).config.model_dump(mode="json")))
        self._command = [sys.executable, "-m", "clm_dist"]
        if user is not None:
            os.chown(self.directory, user, user)
            # The tests' own Python may be one that only root can reach.
            paths = ":".join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
            self._environment |= {"PYTHONPATH": paths, "HOME": str(self.directory), "USER": "drill"}
            self._command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "/usr/bin/python3"]
            self._command += ["-m", "clm_dist"]
        super().__init__(RunDir(self.directory / "runs" / "tiny"))
        self.job_id = ""

    def clm_dist(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A command of clm-dist, in the directory of the job."""
        command = [*self._command, *arguments]
        ended = subprocess.run(command, env=self._environment, cwd=self.directory, capture_output=True, text=True)
        assert not check or ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    def submit(self, *options: str, nodes: int = 2) -> None:
        self.clm_dist("submit", "slurm", "tiny.yaml", f"--nodes={nodes}", "--store=store", "--time=30", *options)
        self.job_id = read_json(self.directory / "runs" / ".submitted" / "tiny" / "submission.json")["job_id"]

    def states(self) -> list[dict[str, str]]:
        """What Slurm says of the job, of each task if it is an array."""
        lines = self.slurm.ask("scontrol", "show", "job", "--oneliner", self.job_id).splitlines()
        return [dict(re.findall(r"(?<!\S)(\w+)=(\S*)", line)[::-1]) for line in lines]

    def state(self) -> dict[str, str]:
        return self.states()[0]

    def said(self) -> str:
        """All that the driver and the nodes logged."""
        return self.clm_dist("logs").stdout

    def wait_until(self, condition: Callable[[], Any]) -> float:
        """Wait while the job waits or runs; gives the time."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert not self.has_ended(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return time.monotonic()

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.last_step() >= step)

    def has_ended(self) -> bool:
        active = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        return not any(state["JobState"] in active for state in self.states())

    def wait_ended(self) -> str:
        """How Slurm says that it ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.has_ended():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.3)
        return self.state()["JobState"]

    def hosts(self) -> list[list[str]]:
        """The host of each worker, for every start."""
        return [record["hosts"] for record in self.records("start")]

    def requeues(self) -> int:
        return int(self.state()["Restarts"])
