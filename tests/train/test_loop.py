"""What the loop promises of its saves, whoever takes its reports."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from clm_dist.config import JobConfig
from clm_dist.run_dir import RunDir
from clm_dist.train.checkpoint import commit, committed, is_committed
from clm_dist.train.loop import Session, train
from clm_dist.train.record import Message
from tests.conftest import MakeJob
from tests.workers import forget_accelerate


def test_a_save_waits_until_the_one_before_is_committed(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job("train.max_steps=6", "checkpoint.every=2")
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    commits: list[threading.Thread] = []
    saved: list[tuple[str, list[bool]]] = []

    def report(message: Message, checkpoint: Path | None, name: str | None) -> None:
        if checkpoint is None or name is None:
            return
        saved.append((name, [is_committed(run.checkpoints / earlier) for earlier, _ in saved]))

        def commit_late(share: Path, name: str) -> None:
            time.sleep(0.3)
            shutil.move(share, run.checkpoints / name)
            commit(run.checkpoints, name, keep=9)

        commits.append(threading.Thread(target=commit_late, args=(checkpoint, name)))
        commits[-1].start()

    session = Session(rank=0, world_size=1, use_gpu=False, num_threads=1, run=run, store=prepared(job), report=report)
    try:
        assert train(job, session).status == "done"
    finally:
        for thread in commits:
            thread.join()
        forget_accelerate()
    assert [before for _, before in saved] == [[], [True], [True, True]]
    assert len(committed(run.checkpoints)) == 3
