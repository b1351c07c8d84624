"""Nodes of a Ray cluster that are drained, lost and come back under `clm-dist run`: `python -m tests.drills.nodes`.

The nodes are raylets on this machine. Of one that is lost the raylet is killed with SIGKILL, and its workers end with
it; nobody else is told. The head finds out by its health check, here in 1.5 s; with Ray's defaults it takes 15 s more.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from clm_dist.config.load import load_job
from clm_dist.files.run_dir import RunDir
from tests.conftest import tiny_job, write_corpus
from tests.support.runs import RunView, compare, saved_steps

TIMEOUT_S = 180
BEGIN = 70
"""A node is lost or drained when this step is on disk."""
NUM_STEPS = 1200
SETTINGS = (
    # Eight passes a step, so that some hundred steps take longer than nodes need to come and go.
    "batch.global_size=32",
    "train.epochs=9999",
    f"train.max_steps={NUM_STEPS}",
    "eval.every=400",
    "checkpoint.every=50",
)
FIXED = (*SETTINGS, "model.config.resid_pdrop=0.1", "cluster.workers=2")
# At the tiny job's 1e-3 rounding alone makes the losses of 1 and of 2 workers differ by 1e-6 after 150 steps, and by
# 7e-3 after 300; at 1e-4 by 5e-9 at most.
UNTOUCHED_ELASTIC = (*SETTINGS, "train.learning_rate=1e-4", "cluster.workers=2")
ELASTIC = (*UNTOUCHED_ELASTIC, "cluster.workers=[1,2]")
_QUICK_HEALTH_CHECK = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
}
_NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class Nodes:
    """A Ray of a head with one CPU, and nodes with one CPU each. In the main thread only."""

    def __init__(self) -> None:
        head = {"include_dashboard": False, "_system_config": _QUICK_HEALTH_CHECK, **_NODE}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address

    def add(self) -> Any:
        return self._cluster.add_node(**_NODE)

    def kill(self, node: Any) -> None:
        """End a node as a power cut does."""
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def drain(self, node: Any, grace_s: float) -> None:
        """Announce the end of a node, as the watcher of a spot instance does. Whoever announces it ends it, too."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + grace_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "a drill", deadline_ms)
        assert accepted, why

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def some_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


class Command(RunView):
    """`clm-dist run` of the tiny job in a process of its own; its runs and its store lie in a directory."""

    def __init__(self, directory: Path, *settings: str) -> None:
        self._directory = directory
        directory.mkdir(parents=True)
        self._job = directory / "tiny.yaml"
        self._job.write_text(yaml.safe_dump(tiny_job(write_corpus(directory))))
        self._job.write_text(yaml.safe_dump(load_job(self._job, settings).config.model_dump(mode="json")))
        super().__init__(RunDir(directory / "runs" / "tiny"))
        self._said = directory / "said.txt"
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def started(self, address: str | None) -> Iterator[None]:
        """The command runs on the Ray at an address, or on one of its own; at the end it does not run any more."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        command = [sys.executable, "-m", "clm_dist", "run", str(self._job)]
        command += ["--runs", str(self.run.root.parent), "--store", str(self._directory / "store")]
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            yield
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def finish(self) -> int:
        """Its exit code, once there is one."""
        assert self._process is not None
        return self._process.wait(TIMEOUT_S)

    def said(self) -> str:
        return self._said.read_text()

    def wait_until(self, condition: Callable[[], Any]) -> float:
        """Wait while the command runs; gives the time."""
        assert self._process is not None
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return time.monotonic()


@dataclass(frozen=True)
class Seen:
    """What a drill found."""

    command: Command
    codes: tuple[int, ...]
    """Exit codes of the command, which was given until the run was done."""
    step: int
    """The last step that was on disk when the node was lost or drained."""
    times: dict[str, float]
    """Seconds from one event to another."""


def untouched(directory: Path, *settings: str) -> Command:
    """A run that nobody touched, in a Ray of its own."""
    command = Command(directory, *settings)
    with command.started(None):
        assert command.finish() == 0, command.said()
    return command


@contextmanager
def begun(command: Command, nodes: Nodes) -> Iterator[tuple[int, float]]:
    """The command on these nodes, once it trains: its last step and the time."""
    with command.started(nodes.address):
        command.wait_until(lambda: command.last_step() >= BEGIN)
        yield command.last_step(), time.monotonic()


def drain(directory: Path, grace_s: float = 20) -> Seen:
    """Two workers, and the node of one is drained: the run saves and stops, and the same command goes on."""
    command = Command(directory, *FIXED)
    with some_nodes() as nodes:
        node = nodes.add()
        with begun(command, nodes) as (step, drained):
            nodes.drain(node, grace_s)
            codes = [command.finish()]
            times = {"drain to exit": time.monotonic() - drained}
        nodes.remove(node)
        nodes.add()
        began = time.monotonic()
        with command.started(nodes.address):
            finished = command.wait_until(lambda: command.has_step_of_start(2))
            times["same command again to its first step"] = finished - began
            codes.append(command.finish())
    return Seen(command, tuple(codes), step, times)


def lose(directory: Path, away_s: float = 20) -> Seen:
    """Two workers, and the node of one is lost: the run waits for another, and goes on when it comes."""
    command = Command(directory, *FIXED, "train.max_failures=1")
    with some_nodes() as nodes:
        node = nodes.add()
        with begun(command, nodes) as (step, killed):
            nodes.kill(node)
            waits = command.wait_until(lambda: "Waiting for nodes" in command.said())
            time.sleep(max(0, killed + away_s - time.monotonic()))
            nodes.add()
            added = time.monotonic()
            finished = command.wait_until(lambda: command.has_step_of_start(2))
            code = command.finish()
    times = {
        "kill to the note that it waits": waits - killed,
        "kill to the new node, as the drill has it": added - killed,
        "new node to the next finished step": finished - added,
        "kill to the next finished step": finished - killed,
    }
    return Seen(command, (code,), step, times)


def shrink_and_grow(directory: Path) -> Seen:
    """One or two workers, and a node is lost and another comes: the run goes on with one, then with two."""
    command = Command(directory, *ELASTIC)
    with some_nodes() as nodes:
        node = nodes.add()
        with begun(command, nodes) as (step, killed):
            nodes.kill(node)
            shrunk = command.wait_until(lambda: command.has_step_of_start(2))
            nodes.add()
            added = time.monotonic()
            grown = command.wait_until(lambda: command.has_step_of_start(3))
            code = command.finish()
    times = {
        "kill to the next finished step, with 1": shrunk - killed,
        "new node to the first step with 2": grown - added,
    }
    return Seen(command, (code,), step, times)


def drain_elastic(directory: Path, grace_s: float = 10) -> Seen:
    """One or two workers, and a node is drained: the run saves, and goes on with one when the node is taken away."""
    # What is announced is no failure.
    command = Command(directory, *ELASTIC, "train.max_failures=0")
    with some_nodes() as nodes:
        node = nodes.add()
        with begun(command, nodes) as (step, drained):
            nodes.drain(node, grace_s)
            saved = command.wait_until(lambda: any(at >= step for at in saved_steps(command.run)))
            command.wait_until(lambda: time.monotonic() > drained + grace_s)
            nodes.remove(node)
            shrunk = command.wait_until(lambda: command.has_step_of_start(2))
            code = command.finish()
    times = {
        "drain to the commit": saved - drained,
        f"end of the {grace_s:g} s to the next finished step, with 1": shrunk - drained - grace_s,
    }
    return Seen(command, (code,), step, times)


DRILLS: dict[str, tuple[Callable[[Path], Seen], Sequence[str]]] = {
    "drain": (drain, FIXED),
    "lose": (lose, FIXED),
    "drain elastic": (drain_elastic, UNTOUCHED_ELASTIC),
    "shrink and grow": (shrink_and_grow, UNTOUCHED_ELASTIC),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        whole: dict[Sequence[str], Command] = {}
        for name in sys.argv[1:] or DRILLS:
            drill, settings = DRILLS[name]
            if settings not in whole:
                whole[settings] = untouched(Path(directory) / f"untouched-{len(whole)}", *settings)
            seen = drill(Path(directory) / name)
            print(f"\n{name}: {drill.__doc__}")
            for what, seconds in seen.times.items():
                print(f"{seconds:8.1f} s  {what}")
            starts = ", ".join(f"{step} with {workers}" for step, workers in seen.command.starts())
            print(f"    exit codes {seen.codes}; on disk then: step {seen.step}; started after step {starts}")
            print(f"    {compare(seen.command, whole[settings])}")


if __name__ == "__main__":
    main()
