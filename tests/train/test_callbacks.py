"""What Ray Train's controller calls."""

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from clm_dist.config.load import job_text
from clm_dist.errors import CheckpointError, ConfigError, DataError, RunError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir
from clm_dist.train.memory import PassTooLargeError
from clm_dist.train.micro_size import with_blocks_that_fit
from clm_dist.train.ray import signals
from clm_dist.train.ray.callbacks import Group
from clm_dist.train.ray.failures import cause_of, reason_of
from clm_dist.train.ray.own import RayEndedError
from tests.conftest import MakeJob
from tests.support.runs import checkpoints_of


def test_workers_that_end_before_they_train_are_started_so_often_and_those_without_nodes_for_ever(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=False, max_failures=2)

    def start(*, placed: bool, trains: bool = False) -> None:
        group.before_worker_group_start(None)
        if placed:
            assert group.before_init_train_context([]) == {}
        if trains:
            group.after_worker_group_training_start(object())
        group.before_controller_execute_failure_decision("RETRY")

    for _ in range(9):
        start(placed=False)
        start(placed=True)
        start(placed=True, trains=True)
    start(placed=True)
    start(placed=False)
    start(placed=True)
    with pytest.raises(RunError, match=r"workers end before they train, 3 times in a row; see that clm-dist is inst"):
        start(placed=True)


@pytest.mark.parametrize(
    ("error", "ends"), [(ConfigError("no head"), True), (DataError("a shard"), False), (RuntimeError("killed"), False)]
)
def test_a_worker_that_meets_what_a_person_must_mend_is_not_started_again(
    error: Exception, ends: bool, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=False, max_failures=2)
    group.after_worker_group_poll_status(SimpleNamespace(errors={}))
    group.after_worker_group_poll_status(SimpleNamespace(errors={0: RuntimeError("Connection closed"), 1: error}))
    with pytest.raises(ConfigError, match=r"^no head$") if ends else contextlib.nullcontext():
        group.before_controller_execute_failure_decision("RETRY")


def test_workers_whose_pass_does_not_fit_take_half_the_blocks(make_job: MakeJob, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=False, max_failures=2)
    settings = ("batch.global_size=6", "batch.micro_size=32")
    job = make_job(*settings)
    run.job.write_text(job_text(job))

    def fail_with(error: Exception) -> int:
        group.after_worker_group_poll_status(SimpleNamespace(errors={0: RuntimeError("Connection closed"), 1: error}))
        group.before_controller_execute_failure_decision("RETRY")
        return with_blocks_that_fit(job, run).batch.known_micro_size

    too_large = PassTooLargeError("CUDA out of memory")
    assert fail_with(torch.OutOfMemoryError("of the optimizer")) == 32
    assert [fail_with(too_large) for _ in range(3)] == [3, 2, 1]
    assert fail_with(RuntimeError("killed")) == 1
    with pytest.raises(ConfigError, match=r"a pass of one block does not fit into memory; set train\.grad"):
        fail_with(too_large)
    # A person who has changed what a pass needs is obeyed.
    for changed in ("batch.micro_size=4", "train.gradient_checkpointing=true", "cluster.strategy=zero2"):
        other = make_job(*settings, changed)
        assert with_blocks_that_fit(other, run) == other


class Running:
    """Workers that save when they are asked to."""

    def __init__(self, run: RunDir, save: Any) -> None:
        self._run, self._save, self.num_polls = run, save, 0

    def poll_status(self, timeout: float) -> SimpleNamespace:
        self.num_polls += 1
        if self.num_polls == 3 and self._run.save.exists():
            self._save()
        return SimpleNamespace(errors={}, finished=False)


def test_elastic_workers_save_before_others_take_their_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=True, max_failures=2)

    def save() -> None:
        (run.checkpoints / "step-00000007-x").mkdir(parents=True)
        (run.checkpoints / "step-00000007-x" / "committed.json").touch()

    running = Running(run, save)
    group.before_controller_execute_resize_decision(None)
    assert not run.save.exists()
    group.after_worker_group_training_start(running)
    group.before_controller_execute_resize_decision(None)
    assert running.num_polls == 3
    assert not run.save.exists()


def test_a_storage_that_is_away_stops_no_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=True, max_failures=2)
    group.after_worker_group_training_start(Running(run, None))

    def fail(self: Checkpoints) -> list[str]:
        raise ConnectionError("away")

    monkeypatch.setattr(Checkpoints, "committed", fail)
    group.before_controller_execute_resize_decision(None)
    assert not run.save.exists()


class DiedError(Exception):
    """As Ray Train tells of a process that ended."""

    health_check_failure = "died"


def test_the_cause_of_several_failures_is_not_the_connection_that_was_lost_by_it() -> None:
    lost = RuntimeError("Connection closed by peer")
    assert reason_of({0: lost, 1: DiedError("x")}) == (
        1,
        "its process ended (killed, out of memory, or its node is gone)",
    )
    assert reason_of({0: lost, 1: ValueError("first.\nsecond")}) == (1, "ValueError: first")
    assert reason_of({0: DiedError("x"), 1: CheckpointError("ours")}) == (1, "CheckpointError: ours")
    assert reason_of({0: lost, 1: lost}) == (0, "RuntimeError: Connection closed by peer")


def test_a_failure_of_the_controller_is_not_taken_for_one_of_workers() -> None:
    error = SimpleNamespace(controller_failure=ConnectionError("no route to the bucket"))
    said = cause_of(error)  # type: ignore[arg-type]
    assert isinstance(said, RunError)
    assert "controller failed, which is not tried again: ConnectionError: no route to the bucket" in str(said)
    assert "max_failures" not in str(said)


def test_a_ray_that_has_ended_is_a_reason_to_try_again() -> None:
    said = cause_of(ray.exceptions.ActorDiedError())
    assert isinstance(said, RayEndedError)
    assert (said.exit_code, said.ends_process) == (75, True)
    assert "The committed checkpoints are whole" in str(said)
    # An error of a task is that of its function.
    inner = ConfigError("mend it")
    assert cause_of(ray.exceptions.RayTaskError("f", "Traceback ...", inner).as_instanceof_cause()) is inner


def test_the_first_signal_asks_and_the_next_is_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_asked", False)
    rays: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: rays.append(number))
    try:
        signals.install()
        assert not signals.asked_to_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked_to_stop()
        assert rays == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert rays == [signal.SIGUSR1]
        signals.uninstall()
        # Ray ends its workers by a signal of its own.
        monkeypatch.setattr(signals, "_asked", False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not signals.asked_to_stop()
        assert rays == [signal.SIGUSR1] * 2
    finally:
        signals.uninstall()
        signal.signal(signal.SIGUSR1, before)
