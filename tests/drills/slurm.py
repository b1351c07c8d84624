"""What a real Slurm cluster does to `clm-dist submit slurm`: `python -m tests.drills.slurm [DRILL...]`.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_dist.job import load_job
from clm_dist.run_dir import RunDir, read_json
from tests.conftest import ROOT, tiny_job, write_corpus
from tests.drills.nodes import Command
from tests.runs import RunView, compare

PROGRAM = ROOT.parent / "shared" / "slurm" / "slurm-cluster"
TIMEOUT_S = 240
NUM_STEPS = 400
BEGIN = 70
"""Something happens when this step is on disk."""
SETTINGS = (
    "batch.global_size=32",
    "train.epochs=9999",
    f"train.max_steps={NUM_STEPS}",
    "eval.every=200",
    "checkpoint.every=50",
)
DROPOUT = "model.config.resid_pdrop=0.1"
TWO = (*SETTINGS, DROPOUT, "cluster.workers=2")
LONGER = (*TWO, "train.max_steps=2500")
THREE = (*SETTINGS, DROPOUT, "train.max_steps=100", "cluster.workers=3", "cluster.gpus_per_worker=0")
# This machine alone may have no more than two cores.
UNTOUCHED_THREE = (*THREE, "cluster.cpus_per_worker=0.5")
ELASTIC = (*SETTINGS, "train.learning_rate=1e-4", "cluster.workers=[1,2]")
"""With the learning rate at which rounding does not grow (see `tests.drills.nodes`)."""
UNTOUCHED_ELASTIC = (*SETTINGS, "train.learning_rate=1e-4", "cluster.workers=2")


class Slurm:
    """A Slurm cluster of this drill's own.

    Args:
        directory: not below /tmp, which its hosts do not share.
    """

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
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
        options = {"env": self.environment, "cwd": self.directory}
        return subprocess.check_output(command, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]

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
        self._user = user
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

    def wait_for_step(self, step: int = BEGIN) -> None:
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


@dataclass(frozen=True)
class Seen:
    """What a drill found."""

    job: SlurmJob
    steps_lost: int
    """Finished ones that were computed again."""
    seconds_lost: float
    """From what happened to the next step that was not there before."""


def _watch(job: SlurmJob) -> Seen:
    """From something that has just happened to the end of the job."""
    happened = time.monotonic()
    number, last = len(job.starts()), job.last_step()

    def goes_on() -> bool:
        nonlocal last
        if len(job.starts()) == number:
            last = max(last, job.last_step())
            return False
        return job.last_step() > last

    went_on = job.wait_until(goes_on)
    assert job.wait_ended() == "COMPLETED", job.said()
    return Seen(job, max(0, last - job.starts()[number][0]), went_on - happened)


def _begun(slurm: Slurm, name: str, settings: Sequence[str] = TWO, *options: str) -> SlurmJob:
    job = SlurmJob(slurm, name, settings)
    job.submit(*options)
    job.wait_for_step()
    return job


def raylet(slurm: Slurm) -> Seen:
    """kill -9 of the raylet of a host that is not the head."""
    job = _begun(slurm, "raylet")
    slurm.kill("node2", "raylet/raylet ")
    return _watch(job)


def head(slurm: Slurm) -> Seen:
    """kill -9 of the head's raylet."""
    job = _begun(slurm, "head")
    slurm.kill("node1", "raylet/raylet ")
    return _watch(job)


def signalled(slurm: Slurm) -> Seen:
    """scancel --signal=USR1 --batch, as Slurm sends it before the time limit."""
    job = _begun(slurm, "signalled")
    slurm.ask("scancel", "--signal=USR1", "--batch", job.job_id)
    return _watch(job)


def time_limit(slurm: Slurm) -> Seen:
    """A time limit of two minutes, 90 s before which Slurm sends the signal."""
    job = _begun(slurm, "time limit", LONGER, "--time=2", "--set", "cluster.slurm.signal_s=60")
    job.wait_until(lambda: "signal USR1" in (job.directory / "runs/.submitted/tiny/log").read_text())
    return _watch(job)


def requeued(slurm: Slurm) -> Seen:
    """scontrol requeue: SIGTERM to all, without time for a checkpoint."""
    job = _begun(slurm, "requeued")
    slurm.ask("scontrol", "requeue", job.job_id)
    return _watch(job)


def preempted(slurm: Slurm) -> Seen:
    """A job in a partition that preempts."""
    job = _begun(slurm, "preempted")
    script = slurm.directory / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 5\n")
    slurm.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", str(script))
    return _watch(job)


def power(slurm: Slurm) -> Seen:
    """The power of a host that is not the head goes."""
    job = _begun(slurm, "power")
    slurm.call("fault", "node2", "power")
    try:
        return _watch(job)
    finally:
        slurm.call("heal", "node2")


def head_power(slurm: Slurm) -> Seen:
    """The power of the first host goes, on which Ray's head and the driver are."""
    job = _begun(slurm, "head power")
    slurm.call("fault", "node1", "power")
    try:
        return _watch(job)
    finally:
        slurm.call("heal", "node1")


def link(slurm: Slurm) -> Seen:
    """The network of a host that is not the head goes; its processes live on."""
    job = _begun(slurm, "link")
    slurm.call("fault", "node2", "link")
    try:
        return _watch(job)
    finally:
        slurm.call("heal", "node2")


def head_link(slurm: Slurm) -> Seen:
    """The network of the first host goes; the driver and its worker live on."""
    job = _begun(slurm, "head link")
    slurm.call("fault", "node1", "link")
    try:
        return _watch(job)
    finally:
        slurm.call("heal", "node1")


def elastic(slurm: Slurm) -> Seen:
    """One or two workers, and the power of a host goes: the run goes on without it, and without a requeue."""
    job = _begun(slurm, "elastic", ELASTIC)
    slurm.call("fault", "node2", "power")
    try:
        return _watch(job)
    finally:
        slurm.call("heal", "node2")


@dataclass(frozen=True)
class Drill:
    play: Callable[[Slurm], Seen]
    settings: Sequence[str] = TWO
    """Of the run that nobody touched."""
    requeues: int | None = 1
    """None where it depends on how fast the machine is."""
    told: bool = False
    """The job is told before, so that it loses no step."""
    leaves_files: bool = False
    """A host without power cannot clean up; the next job there does."""


DRILLS: Mapping[str, Drill] = {
    drill.play.__name__.replace("_", " "): drill
    for drill in [
        Drill(raylet, requeues=0),
        Drill(head),
        Drill(signalled, told=True),
        Drill(time_limit, LONGER, requeues=None, told=True),
        Drill(preempted, told=True),
        Drill(requeued),
        Drill(link),
        Drill(head_link),
        Drill(power, leaves_files=True),
        Drill(head_power, leaves_files=True),
        Drill(elastic, UNTOUCHED_ELASTIC, requeues=0, leaves_files=True),
    ]
}


def untouched(directory: Path, settings: Sequence[str]) -> Command:
    """A run of the same job that nobody touched, without Slurm, in a Ray of its own."""
    command = Command(directory, *settings)
    with command.started(None):
        assert command.finish() == 0, command.said()
    return command


def main() -> None:
    whole: dict[Sequence[str], Command] = {}
    with a_cluster() as slurm:
        print("| drill | requeues | steps lost | seconds lost | weights | loss, largest deviation | left |")
        print("| --- | ---: | ---: | ---: | --- | ---: | --- |")
        for name in sys.argv[1:] or DRILLS:
            drill = DRILLS[name]
            if drill.settings not in whole:
                whole[drill.settings] = untouched(slurm.directory / f"whole-{len(whole)}", drill.settings)
            seen = drill.play(slurm)
            found = compare(seen.job, whole[drill.settings])
            row = [
                (drill.play.__doc__ or "").rstrip("."),
                str(seen.job.requeues()),
                str(seen.steps_lost),
                f"{seen.seconds_lost:.0f}",
                "the same" if found.same_weights and found.same_blocks else "differ",
                f"{found.loss_deviation:.1e}",
                "(no power)" if drill.leaves_files else ", ".join(slurm.leavings()) or "nothing",
            ]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
