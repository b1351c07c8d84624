"""What happens to the pods of `clm-dist submit k8s`, which really run: `python -m tests.drills.k8s [DRILL...]`."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.drills.k8s_pods import PodJob, a_directory, podrun, processes_of
from tests.drills.nodes import untouched
from tests.drills.slurm import BEGIN, TWO
from tests.drills.watch import Seen, watch
from tests.support.runs import compare

_HOG = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("0")
held = []
while True:
    held.append(b"x" * 2**24)
    time.sleep(0.01)
"""
"""Takes all the memory of a container; the kernel ends Ray's workers first, as Ray tells it to."""


def whole(job: PodJob) -> None:
    """Nothing."""


def retry(job: PodJob) -> Seen[PodJob]:
    """kill -9 of the driver: the operator makes a new cluster."""
    (driver,) = processes_of(job.running("-head-"), "clm_dist run")
    os.kill(driver, 9)
    return watch(job)


def killed_worker(job: PodJob) -> Seen[PodJob]:
    """kill -9 of a worker pod's container."""
    job.kill("-worker-")
    return watch(job)


def killed_head(job: PodJob) -> Seen[PodJob]:
    """kill -9 of the head's container."""
    job.kill("-head-")
    return watch(job)


def drained_worker(job: PodJob) -> Seen[PodJob]:
    """A worker pod is drained."""
    job.drain("-worker-")
    return watch(job)


def deleted_head(job: PodJob) -> Seen[PodJob]:
    """The head's pod is deleted."""
    job.drain("-head-")
    return watch(job)


def out_of_memory(job: PodJob) -> Seen[PodJob]:
    """The kernel ends a worker for lack of memory."""
    pod = job.running("-worker-")
    (group,) = (path for path, name in pod.cgs.items() if name == "ray")
    trains = processes_of(pod, "TrainWorker")
    hog = subprocess.Popen([sys.executable, "-c", _HOG, f"{group}/cgroup.procs"])
    try:
        job.wait_until(lambda: not set(trains) & set(processes_of(pod, "TrainWorker")))
        assert podrun().oom_kills(group)
    finally:
        hog.kill()
        hog.wait()
    return watch(job)


def plain(job: PodJob) -> None:
    """Nothing, in an Indexed Job."""


def plain_drained(job: PodJob) -> Seen[PodJob]:
    """In an Indexed Job: a pod is drained."""
    job.drain("tiny-1-")
    return watch(job)


def plain_deleted_head(job: PodJob) -> Seen[PodJob]:
    """In an Indexed Job: the first pod is deleted."""
    job.drain("tiny-0-")
    return watch(job)


@dataclass(frozen=True)
class Drill:
    play: Callable[[PodJob], Seen[PodJob] | None]
    told: bool = False
    """The run is told before, so that it loses no step."""
    clusters: int = 1
    """Ray clusters that the operator makes."""

    @property
    def is_plain(self) -> bool:
        return self.play.__name__.startswith("plain")

    def run(self, directory: Path) -> tuple[PodJob, Seen[PodJob] | None]:
        """Play it; gives the job, which has ended well."""
        with PodJob(directory, TWO, plain=self.is_plain) as job:
            job.wait_for_step(BEGIN)
            seen = self.play(job)
            status = job.wait_ended()
        assert "Complete" in (status.get("jobDeploymentStatus"), status.get("condition")), job.said()
        assert len(status.get("attempts", [None])) == self.clusters, status
        return job, seen


DRILLS: Mapping[str, Drill] = {
    drill.play.__name__.replace("_", " "): drill
    for drill in [
        Drill(whole),
        Drill(retry, clusters=2),
        Drill(killed_worker),
        Drill(killed_head),
        Drill(drained_worker, told=True),
        Drill(deleted_head, told=True),
        Drill(out_of_memory),
        Drill(plain),
        Drill(plain_drained, told=True),
        Drill(plain_deleted_head, told=True),
    ]
}


def main() -> None:
    print("| drill | steps lost | seconds lost | weights | loss, largest deviation |")
    print("| --- | ---: | ---: | --- | ---: |")
    with a_directory() as directory:
        local = untouched(directory / "local", *TWO)
        for name in sys.argv[1:] or DRILLS:
            job, seen = DRILLS[name].run(directory / name.replace(" ", "-"))
            found = compare(job, local)
            row = [
                (DRILLS[name].play.__doc__ or "").rstrip("."),
                str(seen.steps_lost) if seen else "",
                f"{seen.seconds_lost:.0f}" if seen else "",
                "the same" if found.same_weights and found.same_blocks else "differ",
                f"{found.loss_deviation:.1e}",
            ]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
