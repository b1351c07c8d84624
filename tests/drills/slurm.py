"""What a real Slurm cluster does to `clm-dist submit slurm`: `python -m tests.drills.slurm [DRILL...]`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.drills.nodes import Command, untouched
from tests.drills.slurm_cluster import Slurm, SlurmJob, a_cluster
from tests.drills.watch import Seen, watch
from tests.support.runs import compare

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


def _watch(job: SlurmJob) -> Seen[SlurmJob]:
    """From something that has just happened to the end of the job."""
    seen = watch(job)
    assert job.wait_ended() == "COMPLETED", job.said()
    return seen


def _begun(slurm: Slurm, name: str, settings: Sequence[str] = TWO, *options: str) -> SlurmJob:
    job = SlurmJob(slurm, name, settings)
    job.submit(*options)
    job.wait_for_step(BEGIN)
    return job


def raylet(slurm: Slurm) -> Seen[SlurmJob]:
    """kill -9 of the raylet of a host that is not the head."""
    job = _begun(slurm, "raylet")
    slurm.kill("node2", "raylet/raylet ")
    return _watch(job)


def head(slurm: Slurm) -> Seen[SlurmJob]:
    """kill -9 of the head's raylet."""
    job = _begun(slurm, "head")
    slurm.kill("node1", "raylet/raylet ")
    return _watch(job)


def signalled(slurm: Slurm) -> Seen[SlurmJob]:
    """scancel --signal=USR1 --batch, as Slurm sends it before the time limit."""
    job = _begun(slurm, "signalled")
    slurm.ask("scancel", "--signal=USR1", "--batch", job.job_id)
    return _watch(job)


def time_limit(slurm: Slurm) -> Seen[SlurmJob]:
    """A time limit of two minutes, 90 s before which Slurm sends the signal."""
    job = _begun(slurm, "time limit", LONGER, "--time=2", "--set", "cluster.slurm.signal_s=60")
    job.wait_until(lambda: "signal USR1" in (job.directory / "runs/.submitted/tiny/log").read_text())
    return _watch(job)


def requeued(slurm: Slurm) -> Seen[SlurmJob]:
    """scontrol requeue: SIGTERM to all, without time for a checkpoint."""
    job = _begun(slurm, "requeued")
    slurm.ask("scontrol", "requeue", job.job_id)
    return _watch(job)


def preempted(slurm: Slurm) -> Seen[SlurmJob]:
    """A job in a partition that preempts."""
    job = _begun(slurm, "preempted")
    script = slurm.directory / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 5\n")
    slurm.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", str(script))
    return _watch(job)


def _broken(slurm: Slurm, name: str, node: str, kind: str, settings: Sequence[str] = TWO) -> Seen[SlurmJob]:
    job = _begun(slurm, name, settings)
    slurm.call("fault", node, kind)
    try:
        return _watch(job)
    finally:
        slurm.call("heal", node)


def power(slurm: Slurm) -> Seen[SlurmJob]:
    """The power of a host that is not the head goes."""
    return _broken(slurm, "power", "node2", "power")


def head_power(slurm: Slurm) -> Seen[SlurmJob]:
    """The power of the first host goes, on which Ray's head and the driver are."""
    return _broken(slurm, "head power", "node1", "power")


def link(slurm: Slurm) -> Seen[SlurmJob]:
    """The network of a host that is not the head goes; its processes live on."""
    return _broken(slurm, "link", "node2", "link")


def head_link(slurm: Slurm) -> Seen[SlurmJob]:
    """The network of the first host goes; the driver and its worker live on."""
    return _broken(slurm, "head link", "node1", "link")


def elastic(slurm: Slurm) -> Seen[SlurmJob]:
    """One or two workers, and the power of a host goes: the run goes on without it, and without a requeue."""
    return _broken(slurm, "elastic", "node2", "power", ELASTIC)


@dataclass(frozen=True)
class Drill:
    play: Callable[[Slurm], Seen[SlurmJob]]
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


def main() -> None:
    whole: dict[Sequence[str], Command] = {}
    with a_cluster() as slurm:
        print("| drill | requeues | steps lost | seconds lost | weights | loss, largest deviation | left |")
        print("| --- | ---: | ---: | ---: | --- | ---: | --- |")
        for name in sys.argv[1:] or DRILLS:
            drill = DRILLS[name]
            if drill.settings not in whole:
                whole[drill.settings] = untouched(slurm.directory / f"whole-{len(whole)}", *drill.settings)
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
