"""How far a run has trained: from its records, and through a log."""

from clm_dist.files.record_types import Record, StartRecord, StepRecord
from clm_dist.submit.training import Training, recent


def start(step: int, num_steps: int) -> Record:
    return StartRecord(
        kind="start",
        step=step,
        num_steps=num_steps,
        time=0.0,
        pid=1,
        workers=1,
        strategy="ddp",
        device="cpu",
        owes_evaluation=False,
    )


def step(number: int, loss: float, seconds: float = 1.0) -> Record:
    return StepRecord(
        kind="step",
        step=number,
        epoch=0.1,
        loss=loss,
        lr=1e-3,
        grad_norm=1.0,
        tokens=9,
        seconds=seconds,
        tokens_per_s=9.0,
        mfu=None,
        data_wait=0.0,
        blocks=7,
    )


def test_nothing_is_known_before_a_worker_begins() -> None:
    assert Training.of_records([]) is None


def test_the_steps_come_from_the_last_start_and_the_time_from_the_last_steps() -> None:
    records = [start(0, 100), *(step(i, 9.0, 60.0) for i in range(1, 11)), start(10, 200)]
    assert Training.of_records([start(0, 100)]) == Training(0, 100)
    records += [step(i, 1 / i, 2.0) for i in range(11, 61)]
    assert Training.of_records(records) == Training(60, 200, 1 / 60, 280.0)
    assert Training.of_records(recent(records)) == Training(60, 200, 1 / 60, 280.0)
    assert len(recent(records)) == 51


def test_a_log_gives_back_the_last_that_was_written_to_it() -> None:
    trainings = [Training(0, 9), Training(3, 9, 2.5, 12.25), Training(4, 9, float("nan"), 0.1 + 0.2)]
    lines = ["2026-01-01 10:00:00 Training · step 8/9"]
    assert Training.of_lines(lines) is None
    for training in trainings:
        lines += [f"[driver] 2026-01-01 10:00:01 {training.as_line()}", "another line"]
        assert repr(Training.of_lines(lines)) == repr(training)


def test_a_line_of_another_version_is_passed_over() -> None:
    lines = [Training(3, 9).as_line(), Training(4, 9).as_line().replace("num_steps", "steps"), "clm-dist training: {"]
    assert Training.of_lines(lines) == Training(3, 9)
