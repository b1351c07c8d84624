"""What the loop promises of its saves, whoever takes its reports."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from clm_dist.config.job import JobConfig
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir
from clm_dist.train.batches import BatchOrder, MicroBatch
from clm_dist.train.heartbeat import Heart
from clm_dist.train.loop import train
from clm_dist.train.messages import Message
from clm_dist.train.recorder import Recorder
from clm_dist.train.session import Session
from clm_dist.train.strategies.environment import forget_accelerate
from tests.conftest import MakeJob
from tests.support.runs import checkpoints_of, saved_steps
from tests.support.training import train_one, train_with_a_recorder_that_fails_once
from tests.support.workers import run_workers


def test_a_save_waits_until_the_one_before_is_committed(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job("train.max_steps=6", "checkpoint.every=2", "checkpoint.keep=9")
    run = RunDir(tmp_path)
    recorder = Recorder(run, checkpoints_of(run), num_micros=0, num_tokens=0, keep=9)
    commits: list[threading.Thread] = []
    saved: list[tuple[str, list[bool]]] = []

    def report(message: Message) -> None:
        if "saved" not in message:
            return
        saved.append((message["saved"].name, [checkpoints_of(run).is_committed(earlier) for earlier, _ in saved]))

        def commit_late() -> None:
            time.sleep(0.3)
            recorder.receive([{"saved": message["saved"], "state": message["state"]}])

        commits.append(threading.Thread(target=commit_late))
        commits[-1].start()

    session = Session(rank=0, world_size=1, use_gpu=False, num_threads=1, run=run, store=prepared(job), report=report)
    try:
        assert train(job, session).status == "done"
    finally:
        for thread in commits:
            thread.join()
        forget_accelerate()
    assert [before for _, before in saved] == [[], [True], [True, True]]
    assert saved_steps(run) == [2, 4, 6]
    assert Checkpoints.of_run(job, run).root == checkpoints_of(run).root


def test_an_error_of_the_recorder_ends_every_rank(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job("train.max_steps=2")
    outcomes = run_workers(train_with_a_recorder_that_fails_once, 2, job, RunDir(tmp_path), prepared(job))
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [("failed", "the recorder fails")] * 2


def test_a_step_that_leaves_out_blocks_ends_the_run(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("train.max_steps=6", "batch.micro_size=4")
    micro_batches = BatchOrder.micro_batches
    steps = itertools.count()

    def some(self: BatchOrder, blocks: npt.NDArray[np.int64], rank: int, world_size: int) -> Iterator[MicroBatch]:
        found = list(micro_batches(self, blocks, rank, world_size))
        return iter(found if next(steps) < 3 else found[:-1])

    monkeypatch.setattr(BatchOrder, "micro_batches", some)
    outcome = train_one(job, RunDir(tmp_path), prepared(job))
    assert (outcome.status, outcome.step) == ("failed", 3)
    assert "step 4 computed 4 blocks of 8" in str(outcome.error)


def test_a_commit_that_does_not_come_is_no_progress(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a worker that stands still may be all that is missing."""
    job = make_job("train.max_steps=4", "checkpoint.every=2")
    at, is_committed = Heart.at, Checkpoints.is_committed
    progress: list[int] = []
    polls: list[int] = []

    def count(self: Heart, step: int, doing: str) -> None:
        at(self, step, doing)
        progress.append(self._progress)

    def late(self: Checkpoints, name: str) -> bool:
        polls.append(progress[-1])
        return len(polls) % 6 == 0 and is_committed(self, name)

    monkeypatch.setattr(Heart, "at", count)
    monkeypatch.setattr(Checkpoints, "is_committed", late)
    assert train_one(job, RunDir(tmp_path), prepared(job)).status == "done"
    assert len(polls) == 12
    assert len(set(polls[:6])) == len(set(polls[6:])) == 1
