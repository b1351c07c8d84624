"""Kill anything, start the same command again, and compare with a run that nobody touched.

    python -m tests.drills.kills [--strategies ddp zero1 zero2 zero3 fsdp2] [--kills 20] [--storage directory|s3]

Each strategy trains the tiny job with dropout, two workers and a checkpoint every 30 steps through `clm-dist run`, in a
process of its own with a Ray of its own. SIGKILL goes to a worker, the driver, Ray's raylet, or the driver with all
that it started; at a random moment while it starts or trains, or as soon as a checkpoint is on its way (which may be in
its write, its upload or its commit). A driver that has ended is started again by the same command. After every kill
all committed checkpoints are read and held against their hashes. In the end the weights must be bit-identical to those
of the run that nobody touched, and so must the loss and the blocks' checksum of every step that was ever recorded.

With `--storage s3` the checkpoints lie on an S3 server (moto) that the drill starts. Exits 1 where anything differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from clm_dist.config.load import load_job
from clm_dist.errors import CheckpointError
from clm_dist.files.atomic import read_json
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir
from clm_dist.train.heartbeat import read_beats
from tests.conftest import ROOT, tiny_job, write_corpus
from tests.support.processes import descendants, running
from tests.support.runs import metrics_of

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TARGETS = ("worker", "driver", "raylet", "all")
MOMENTS = ("training", "checkpoint", "training", "checkpoint", "start")
STEPS_A_KILL = 200
TIMEOUT_S = 300


class DrillError(Exception):
    """A promise that was not kept."""


@dataclass
class Drill:
    """One run that is killed again and again."""

    directory: Path
    job: Path
    run: RunDir
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    started: set[int] = field(default_factory=set)
    seen: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Loss and checksum of the blocks of every step that was recorded."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints.of_run(load_job(self.job).config, self.run)

    def launch(self, *settings: str) -> None:
        command = [sys.executable, "-m", "clm_dist", "run", str(self.job), "--runs", str(self.run.root.parent)]
        command += ["--store", str(self.directory / "store")]
        command += [word for setting in settings for word in ("--set", setting)]
        shutil.rmtree(self.run.beats, ignore_errors=True)
        with (self.directory / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=ROOT)

    @property
    def runs(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            return False
        self.started.update(descendants(self.process.pid))
        return True

    def step(self) -> int:
        return max((r["step"] for r in metrics_of(self.run.metrics) if r["kind"] == "step"), default=0)

    def num_starts(self) -> int:
        return sum(record["kind"] == "start" for record in metrics_of(self.run.metrics))

    def await_moment(self, moment: str, rng: random.Random) -> None:
        """Until the moment has come, or the run has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        starts = self.num_starts()
        if moment == "start":
            time.sleep(rng.uniform(2, 12))
            return
        # A kill in the last life may have left no group that trains.
        while self.runs and not read_beats(self.run.beats) and time.monotonic() < deadline:
            time.sleep(0.02)
        first = self.step()
        steps = rng.randint(1, STEPS_A_KILL // 2)
        committed = set(self.checkpoints.committed())
        while self.runs and time.monotonic() < deadline:
            if moment == "training" and (self.step() >= first + steps or self.num_starts() > starts + 1):
                return
            if moment == "checkpoint" and self.step() and set(self.checkpoints.directories()) - committed:
                return
            time.sleep(0.002)

    def kill(self, target: str, rng: random.Random) -> bool:
        """Whether there was something to kill."""
        if not self.runs:
            return False
        assert self.process
        if target == "worker":
            pids = [beat.pid for beat in read_beats(self.run.beats)]
            pids = [rng.choice(pids)] if pids else []
        elif target == "raylet":
            pids = [pid for pid in self.started if _name(pid) == "raylet"]
        else:
            pids = [self.process.pid] + (descendants(self.process.pid) if target == "all" else [])
        for pid in running(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if target in ("driver", "all"):
            self.process.wait()
        if target == "all":
            # Like a node that lost its power; what is left of Ray after a driver's death ends by itself.
            while running(sorted(self.started)):
                time.sleep(0.05)
        return bool(pids)

    def check(self) -> int:
        """Every committed checkpoint is whole, and every recorded step is what it was; gives the checkpoints."""
        records = [record for record in metrics_of(self.run.metrics) if record["kind"] == "step"]
        for record in records:
            figures = (record["loss"], record["blocks"])
            if self.seen.setdefault(record["step"], figures) != figures:
                raise DrillError(f"step {record['step']} was {self.seen[record['step']]}, and now is {figures}")
        checkpoints = self.checkpoints
        names = checkpoints.committed()
        for name in names:
            try:
                for share in checkpoints.read(name).shares:
                    with checkpoints.reading(name, share):
                        pass
            except (OSError, CheckpointError) as error:
                # One that the run has since retired is not one that was promised.
                if checkpoints.is_committed(name):
                    raise DrillError(f"{name} is committed and cannot be read: {error}") from error
        return len(names)

    def finish(self) -> None:
        """Start the same command until it says that the run is done."""
        for _ in range(5):
            if not self.runs:
                self.launch()
            assert self.process
            if self.process.wait(TIMEOUT_S) == 0:
                return
        raise DrillError(f"the run does not end; see {self.directory / 'log.txt'}")

    def stop(self) -> None:
        """End what still runs of it."""
        self.kill("all", random.Random(0))
        for pid in running(sorted(self.started)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Row:
    strategy: str
    number: int
    target: str
    moment: str
    step: int
    resumed: int
    num_checkpoints: int


def drill(
    strategy: str, num_kills: int, directory: Path, *, storage: str | None, environment: dict[str, str], seed: int
) -> Iterator[Row]:
    """The kills of one strategy. Raises DrillError where a promise is not kept."""
    directory.mkdir(parents=True, exist_ok=True)
    num_steps = STEPS_A_KILL * (num_kills + 1)
    whole = prepare_drill(directory, "whole", strategy, num_steps, None, environment)
    cut = prepare_drill(directory, "cut", strategy, num_steps, storage, environment)
    rng = random.Random(f"{seed} {strategy}")
    try:
        whole.finish()
        whole.check()
        for number in range(num_kills):
            if not cut.runs:
                cut.launch()
            target = TARGETS[number % len(TARGETS)]
            moment = MOMENTS[number % len(MOMENTS)] if target != "worker" else ("training", "checkpoint")[number % 2]
            cut.await_moment(moment, rng)
            if not cut.kill(target, rng):
                raise DrillError(f"there was no {target} to kill; see {directory / 'log.txt'}")
            step = cut.step()
            num_checkpoints = cut.check()
            resumed = max((m.state.step for m in cut.checkpoints.readable().values()), default=0)
            yield Row(strategy, number + 1, target, moment, step, resumed, num_checkpoints)
            if target == "raylet" and cut.process:
                # Workers and driver notice it after many seconds, and train on until then; here the node follows.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    cut.process.wait(rng.uniform(0, 3))
                cut.kill("all", rng)
        cut.finish()
        cut.check()
        compare(whole, cut, num_steps)
    finally:
        whole.stop()
        cut.stop()


def compare(whole: Drill, cut: Drill, num_steps: int) -> None:
    weights = [(one.run.final / "model.safetensors").read_bytes() for one in (whole, cut)]
    if weights[0] != weights[1]:
        raise DrillError("the weights are not those of the run that nobody touched")
    if whole.seen != cut.seen or sorted(cut.seen) != list(range(1, num_steps + 1)):
        raise DrillError("the steps are not those of the run that nobody touched")
    evals = [read_json(one.run.result)["evals"] for one in (whole, cut)]
    if evals[0] != evals[1]:
        raise DrillError("the evaluations are not those of the run that nobody touched")


def prepare_drill(
    directory: Path, name: str, strategy: str, num_steps: int, storage: str | None, environment: dict[str, str]
) -> Drill:
    job = tiny_job(write_corpus(directory))
    job["name"] = f"{name}-{strategy}"
    job["model"]["config"] |= {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    # Four passes of each worker in a step.
    job["batch"] = {"global_size": 8, "micro_size": 1}
    job["train"] |= {"max_steps": num_steps, "epochs": 9999, "max_failures": 99}
    job["eval"] = {"every": 200}
    job["checkpoint"] = {"every": 30} | ({"path": storage} if storage else {})
    job["cluster"] = {"workers": 2, "strategy": strategy}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return Drill(directory, path, RunDir(directory / "runs" / job["name"]), environment)


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[dict[str, str]]:
    """An S3 server with the bucket `drill`; gives the environment that reaches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (directory / "s3.txt").open("wb") as log:
        command = [
            sys.executable,
            "-c",
            "from moto.server import main; import sys; main(sys.argv[1:])",
            "-p",
            str(port),
        ]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    environment = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    environment["AWS_DEFAULT_REGION"] = "us-east-1"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{url}/drill", method="PUT"))
                break
            time.sleep(0.1)
        os.environ.update(environment)  # this process looks at the checkpoints too
        yield environment
    finally:
        server.kill()
        server.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--kills", type=int, default=20, help="of each strategy")
    parser.add_argument("--storage", choices=("directory", "s3"), default="directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clm-dist-drill-") as temporary, contextlib.ExitStack() as stack:
        directory = Path(temporary)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        storage = None
        if options.storage == "s3":
            environment |= stack.enter_context(s3_server(directory))
            storage = "s3://drill/checkpoints"
        print("| strategy | kill | of | while | at step | goes on from | commits, all whole |")
        print("| --- | ---: | --- | --- | ---: | ---: | ---: |")
        for strategy in options.strategies:
            try:
                rows = drill(
                    strategy,
                    options.kills,
                    directory / strategy,
                    storage=storage,
                    environment=environment,
                    seed=options.seed,
                )
                for row in rows:
                    print("|", " | ".join(map(str, vars(row).values())), "|", flush=True)
            except DrillError as error:
                print(f"{strategy}: {error}", flush=True)
                print((directory / strategy / "log.txt").read_text(errors="replace")[-4000:])
                return 1
            print(f"\n{strategy}: after {options.kills} kills every weight, loss and block as without\n", flush=True)
    print(f"{len(options.strategies) * options.kills} kills in {(time.monotonic() - began) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
