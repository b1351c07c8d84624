"""Failures in a row end a run, failures in all do not; and a save that is asked for is made once."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import StorageError
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.train.batches import BatchOrder
from clm_dist.train.checkpointing.saver import write_safetensors
from clm_dist.train.loop import Outcome
from clm_dist.train.loss import next_token_loss
from tests.conftest import MakeJob
from tests.support.runs import saved_steps
from tests.support.training import train_one
from tests.train.test_outliers import of_kind, spoil

TrainFailing = Callable[[set[int]], Outcome]


@pytest.fixture
def train_failing(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainFailing:
    """Trains for six steps, each with a save; those with the given numbers (the first is 1) find a full disk."""

    def train(failing: set[int]) -> Outcome:
        num_saves = 0

        def write(file: Any, tensors: Any) -> tuple[int, str]:
            nonlocal num_saves
            num_saves += 1
            if num_saves in failing:
                raise OSError(28, "No space left on device")
            return write_safetensors(file, tensors)

        monkeypatch.setattr("clm_dist.train.checkpointing.saver.write_safetensors", write)
        job = make_job("train.max_steps=6", "checkpoint.every=1", "checkpoint.keep=9")
        return train_one(job, RunDir(tmp_path), prepared(job))

    return train


def test_saves_that_fail_now_and_then_end_no_run(train_failing: TrainFailing, tmp_path: Path) -> None:
    assert train_failing({1, 3, 5}).status == "done"
    assert saved_steps(RunDir(tmp_path)) == [2, 4, 6]


def test_two_saves_in_a_row_that_fail_end_the_run(train_failing: TrainFailing, tmp_path: Path) -> None:
    outcome = train_failing({2, 3})
    assert (outcome.status, outcome.step) == ("failed", 4)
    assert "the checkpoint of step 3 could not be written" in str(outcome.error)
    assert "neither could the one before it" in str(outcome.error)
    assert saved_steps(RunDir(tmp_path)) == [1]


def test_steps_that_are_skipped_now_and_then_end_no_run(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(
        *("train.on_nan=skip", "train.max_steps=26", "checkpoint.every=1000", "eval.every=1000"),
        *("batch.global_size=1", "batch.micro_size=1"),
    )
    store = prepared(job)
    order = BatchOrder.of_job(job, len(Blocks(store, "train")))
    skipped = list(range(1, 26, 2))
    assert len(skipped) > 10
    # `spoil` replaces it in this process; this takes it back.
    monkeypatch.setattr("clm_dist.train.forward.next_token_loss", next_token_loss)
    spoil(store, "loss", {int(order.global_batch(step - 1)[0]): float("nan") for step in skipped})
    assert train_one(job, RunDir(tmp_path), store).status == "done"
    assert [record["step"] for record in of_kind(tmp_path, "nonfinite")] == skipped


def test_a_save_that_is_asked_for_is_made_once(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clm_dist.train.checkpointing.reporter._STOP_INTERVAL_S", 0.0)
    job = make_job("train.max_steps=4", "checkpoint.every=1000", "checkpoint.keep=9")
    run = RunDir(tmp_path)
    run.save.touch()
    assert train_one(job, run, prepared(job)).status == "done"
    assert not run.save.exists()
    assert saved_steps(run) == [1, 4]


def test_a_fault_that_one_rank_alone_meets_is_raised_and_not_returned(
    make_job: MakeJob, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0 writes the model; returned as the end of all ranks, the fault would leave the others waiting."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clm_dist.train.export.replace_dir", full)
    job = make_job("train.max_steps=2")
    with pytest.raises(StorageError, match=r"no space left while writing .*final.unverified"):
        train_one(job, RunDir(tmp_path / "run"), prepared(job))
