"""What the driver makes of the workers' messages."""

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import pytest

from clm_dist.errors import RunError
from clm_dist.files.markers import RankFile, TrainerState, checkpoint_name
from clm_dist.files.run_dir import RunDir
from clm_dist.train.checkpointing.saver import Saved
from clm_dist.train.messages import Message
from clm_dist.train.recorder import Recorder
from tests.support.runs import checkpoints_of, metrics_of, saved_steps


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "checkpoints").mkdir()
    return RunDir(tmp_path)


def recorder(run: RunDir, keep: int = 2) -> Recorder:
    return Recorder(run, checkpoints_of(run), num_micros=3, num_tokens=30, keep=keep)


def sent(*records: Any, **more: Any) -> Message:
    """A message with records that have no more fields than a test looks at."""
    return cast(Message, {"records": list(records), **more})


def shares(*by_rank: list[int], loss: float = 10.0) -> list[Message]:
    """An evaluation in which each rank ran the micro-batches that are listed."""
    return [
        {
            "records": [],
            "evaluation": {"kind": "eval", "step": 4, "epoch": 0.5, "micros": [(i, loss, 10, 20) for i in indices]},
        }
        for indices in by_rank
    ]


def test_the_start_of_workers_names_their_hosts(run: RunDir) -> None:
    recorder(run).receive([sent({"kind": "start", "step": 0}, host="a"), {"host": "b"}, {"host": "a"}])
    (start,) = metrics_of(run.metrics)
    assert start.pop("startup") >= 0
    assert start == {"kind": "start", "step": 0, "hosts": ["a", "b", "a"]}


def test_the_driver_adds_up_what_the_ranks_ran(run: RunDir) -> None:
    evaluation = recorder(run).receive(shares([0, 2], [1]))
    assert evaluation
    assert (evaluation.loss, evaluation.num_tokens) == (1.0, 30)
    (record,) = metrics_of(run.metrics)
    assert record == {"kind": "eval", **evaluation.figures()}


@pytest.mark.parametrize("wrong", [([0, 2], []), ([0, 1], [1, 2]), ([0], [1])])
def test_an_evaluation_that_does_not_cover_the_split_fails_the_run(run: RunDir, wrong: tuple[list[int], ...]) -> None:
    with pytest.raises(RunError, match=r"micro-batches, the split 3; the committed checkpoints are whole"):
        recorder(run).receive(shares(*wrong))
    assert metrics_of(run.metrics) == []


def steps(*numbers: int) -> list[Message]:
    return [sent(*({"kind": "step", "step": number, "seconds": 2.0**number} for number in numbers))]


def test_steps_that_are_trained_again_are_recorded_once(run: RunDir) -> None:
    first = recorder(run)
    first.receive([sent({"kind": "start", "step": 0})])
    first.receive(steps(1, 2, 3, 4))
    with run.metrics.open("a") as file:
        file.write('{"kind": "st')  # a kill cut the last line short
    second = recorder(run)
    second.receive([sent({"kind": "start", "step": 2})])
    second.receive(steps(3, 4, 5))
    kinds = [(record["kind"], record["step"]) for record in metrics_of(run.metrics)]
    assert kinds == [("start", 0), ("step", 1), ("step", 2), ("start", 2), ("step", 3), ("step", 4), ("step", 5)]
    recorder(run).receive([sent({"kind": "start", "step": 0})])
    starts = metrics_of(run.metrics)
    assert [record["kind"] for record in starts] == ["start"] * 3
    assert [start.get("lost") for start in starts] == [None, 2.0**3 + 2.0**4, 2.0 + 2.0**2 + 2.0**3 + 2.0**4 + 2.0**5]


def test_a_start_says_for_how_long_nothing_was_trained(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0, 131.0, 140.0, 200.0, 201.0])
    monkeypatch.setattr("clm_dist.train.recorder.time.monotonic", lambda: next(now))
    one = recorder(run)
    one.receive([sent({"kind": "start", "step": 0})])
    one.receive(steps(1))
    one.receive([sent({"kind": "start", "step": 0})])
    assert [record["startup"] for record in metrics_of(run.metrics)] == [30.0, 60.0]


def test_an_evaluation_says_how_long_it_took(run: RunDir) -> None:
    messages = shares([0, 2], [1])
    messages[0]["evaluation"]["seconds"] = 7.5
    recorder(run).receive(messages)
    assert metrics_of(run.metrics)[0]["seconds"] == 7.5


STATE = TrainerState(4, 4, 2, "ddp", "blocks", global_size=8, seed=42)


def saves(name: str, *errors: str | None, step: int = 4) -> list[Message]:
    """What the ranks send after a save; each with its error, or with its file written."""
    messages: list[Message] = []
    for rank, error in enumerate(errors):
        share = RankFile(f"rank-{rank}", 10, "0" * 64, {"w": (0, 4)}) if error is None else None
        messages.append({"saved": Saved(name, step, share, error, 2.0 + rank, 0.1)})
    messages[0]["state"] = dataclasses.replace(STATE, step=step)
    return messages


def test_a_checkpoint_is_committed_when_the_last_rank_has_written_its_file(run: RunDir) -> None:
    name = checkpoint_name(4)
    first, second = saves(name, None, None)
    (run.checkpoints / name).mkdir()
    driver = recorder(run)
    driver.receive(shares([0, 2], [1]))
    driver.receive([first, {}])
    assert saved_steps(run) == []
    driver.receive([{}, second])
    assert saved_steps(run) == [4]
    marker = checkpoints_of(run).read(name)
    assert (marker.state, marker.eval_loss, marker.num_bytes) == (STATE, 1.0, 20)
    assert metrics_of(run.metrics)[-1] == {
        "kind": "checkpoint",
        "step": 4,
        "name": name,
        "bytes": 20,
        "seconds": 3.0,
        "blocked": 0.1,
    }


def test_a_checkpoint_that_a_rank_could_not_write_is_removed_and_said(run: RunDir) -> None:
    name = checkpoint_name(4)
    (run.checkpoints / name).mkdir()
    recorder(run).receive(saves(name, None, "no space left"))
    assert not (run.checkpoints / name).exists()
    assert metrics_of(run.metrics)[-1]["error"] == "worker 1: no space left"


def test_what_dead_workers_wrote_completes_no_checkpoint(run: RunDir) -> None:
    name = checkpoint_name(4)
    first, second = saves(name, None, None)
    (run.checkpoints / name).mkdir()
    driver = recorder(run)
    driver.receive([first, {}])
    driver.receive([sent({"kind": "start", "step": 0}), {}])
    driver.receive([{}, second])
    assert saved_steps(run) == []


def test_a_save_has_the_eval_loss_of_its_own_step(run: RunDir) -> None:
    driver = recorder(run)
    driver.receive(shares([0, 2], [1]))
    for step in (4, 6):
        name = checkpoint_name(step)
        (run.checkpoints / name).mkdir()
        driver.receive(saves(name, None, None, step=step))
    assert [m.eval_loss for m in checkpoints_of(run).readable().values()] == [1.0, None]


def test_an_evaluation_that_is_owed_is_recorded_once(run: RunDir) -> None:
    driver = recorder(run)
    driver.receive([sent({"kind": "start", "step": 0})])
    driver.receive(shares([0, 2], [1]))
    # It was made in a part of the run that was lost, so it comes again.
    driver.receive([sent({"kind": "start", "step": 4, "owes_evaluation": True})])
    driver.receive(shares([0, 2], [1]))
    driver.receive([sent({"kind": "start", "step": 4, "owes_evaluation": False})])
    assert [record["kind"] for record in metrics_of(run.metrics)] == ["start", "start", "eval", "start"]


def test_the_reason_of_a_hang_is_told_of_the_failure_that_follows_it_and_of_no_later_one(run: RunDir) -> None:
    driver = recorder(run)
    run.hang.write_text("worker 1 stands still")
    driver.receive_failure(1, "its process ended")
    driver.receive_failure(0, "its process ended")
    run.hang.write_text("worker 1 stood still long ago")
    os.utime(run.hang, (0, 0))
    driver.receive_failure(0, "out of memory")
    assert [record["error"] for record in metrics_of(run.metrics)] == [
        "worker 1 stands still",
        "its process ended",
        "out of memory",
    ]
    assert not run.hang.exists()
