"""Trains jobs in the ranks of a test, without Ray, and puts a run back to an earlier checkpoint."""

import functools
import gc
import shutil
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir
from clm_dist.train.documents import document_end_of
from clm_dist.train.evaluate import EvalSplit
from clm_dist.train.local import train_here
from clm_dist.train.loop import Outcome
from clm_dist.train.recorder import Recorder
from tests.support.runs import checkpoints_of, metrics_of

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SOME_SLOW = [pytest.param(name, marks=() if name in ("ddp", "zero2") else pytest.mark.slow) for name in STRATEGIES]
"""All of them, of which a quick run of the tests takes two."""


def train_one(job: JobConfig, run: RunDir, store: Path, rank: int = 0, world_size: int = 1) -> Outcome:
    run.root.mkdir(parents=True, exist_ok=True)
    document_end = document_end_of(store) if job.data.document_mask else None
    split = EvalSplit.of_store(store, job.eval.micro_size, document_end)
    recorder = Recorder(
        run,
        Checkpoints.of_run(job, run),
        num_micros=split.num_micros,
        num_tokens=split.num_tokens,
        keep=job.checkpoint.keep,
        keep_best=job.train.keep == "best",
    )
    outcome = train_here(job, run, store, recorder, rank=rank, world_size=world_size)
    _freeze_modules()
    return outcome


@functools.cache
def _freeze_modules() -> None:
    """Let the garbage collector pass over all modules, once training has loaded them: see ranks.py."""
    gc.collect()
    gc.freeze()


def train_several(rank: int, world_size: int, jobs: list[JobConfig], runs: list[Path], store: Path) -> list[Outcome]:
    """One process trains several jobs, since each start of processes costs seconds."""
    return [train_one(job, RunDir(run), store, rank, world_size) for job, run in zip(jobs, runs, strict=True)]


def train_one_here(rank: int, world_size: int, job: JobConfig, run: RunDir, store: Path) -> Outcome:
    return train_one(job, run, store, rank, world_size)


def train_with_a_recorder_that_fails_once(
    rank: int, world_size: int, job: JobConfig, run: RunDir, store: Path
) -> Outcome:
    receive = Recorder.receive

    def fail(*_: object) -> None:
        Recorder.receive = receive  # type: ignore[method-assign]
        raise RunError("the recorder fails")

    # In a process of its own.
    Recorder.receive = fail  # type: ignore[method-assign, assignment]
    return train_one(job, run, store, rank, world_size)


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in metrics_of(run / "metrics.jsonl") if record["kind"] == "step"]


def forget_after(run: RunDir, step: int) -> None:
    """Make the checkpoint of a step the last."""
    checkpoints = checkpoints_of(run)
    for name, marker in checkpoints.readable().items():
        if marker.state.step > step:
            checkpoints.remove(name)


def leave_only(source: RunDir, *, step: int, target: RunDir) -> None:
    """A run as it was when its checkpoint of a step was the last."""
    (name,) = (name for name in checkpoints_of(source).committed() if name.startswith(f"step-{step:08d}"))
    shutil.copytree(source.checkpoints / name, target.checkpoints / name)
    shutil.copy(source.metrics, target.metrics)
