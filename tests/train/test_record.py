"""What the driver makes of the workers' messages."""

from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import CheckpointError, RunError
from clm_dist.run_dir import RunDir, read_records
from clm_dist.train.checkpoint import TrainerState, checkpoint_name, commit, committed, read_state, remove_uncommitted
from clm_dist.train.record import Message, Recorder
from tests.conftest import MakeJob


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "checkpoints").mkdir()
    return RunDir(tmp_path)


def recorder(run: RunDir, keep: int = 2) -> Recorder:
    return Recorder(run, num_parts=3, num_tokens=30, keep=keep)


def shares(*by_rank: list[int], loss: float = 10.0) -> list[Message]:
    """An evaluation in which each rank ran the micro-batches that are listed."""
    return [
        {
            "records": [],
            "evaluation": {"kind": "eval", "step": 4, "epoch": 0.5, "parts": [(i, loss, 10, 20) for i in indices]},
        }
        for indices in by_rank
    ]


def test_the_driver_adds_up_what_the_ranks_ran(run: RunDir) -> None:
    evaluation = recorder(run).receive(shares([0, 2], [1]))
    assert evaluation
    assert (evaluation.loss, evaluation.num_tokens) == (1.0, 30)
    (record,) = read_records(run.metrics)
    assert record == {"kind": "eval", **evaluation.as_dict()}


@pytest.mark.parametrize("wrong", [([0, 2], []), ([0, 1], [1, 2]), ([0], [1])])
def test_an_evaluation_that_does_not_cover_the_split_fails_the_run(run: RunDir, wrong: tuple[list[int], ...]) -> None:
    with pytest.raises(RunError, match=r"micro-batches, the split 3; the committed checkpoints are whole"):
        recorder(run).receive(shares(*wrong))
    assert read_records(run.metrics) == []


def records_of(*steps: int) -> list[Message]:
    return [{"records": [{"kind": "step", "step": step} for step in steps]}]


def test_steps_that_are_trained_again_are_recorded_once(run: RunDir) -> None:
    first = recorder(run)
    first.receive([{"records": [{"kind": "start", "step": 0}]}])
    first.receive(records_of(1, 2, 3, 4))
    with run.metrics.open("a") as file:
        file.write('{"kind": "st')  # a kill cut the last line short
    second = recorder(run)
    second.receive([{"records": [{"kind": "start", "step": 2}]}])
    second.receive(records_of(3, 4, 5))
    kinds = [(record["kind"], record["step"]) for record in read_records(run.metrics)]
    assert kinds == [("start", 0), ("step", 1), ("step", 2), ("start", 2), ("step", 3), ("step", 4), ("step", 5)]
    recorder(run).receive([{"records": [{"kind": "start", "step": 0}]}])
    assert [record["kind"] for record in read_records(run.metrics)] == ["start"] * 3


def share(run: RunDir, step: int) -> str:
    """A checkpoint's directory with every share in it, before it is committed."""
    name = checkpoint_name(step)
    (run.checkpoints / name).mkdir()
    TrainerState(step, 2, "ddp", "blocks", global_size=8, seed=42).write(run.checkpoints / name)
    return name


def test_a_checkpoint_counts_from_its_commit_and_the_last_ones_are_kept(run: RunDir) -> None:
    torn = share(run, 40)
    assert committed(run.checkpoints) == []
    for step in (10, 20, 30):
        recorder(run).receive(records_of(step), share(run, step))
    assert [path.name[:13] for path in committed(run.checkpoints)] == ["step-00000020", "step-00000030"]
    # What is not committed is not removed while workers may still write it.
    assert (run.checkpoints / torn).exists()
    remove_uncommitted(run.checkpoints)
    assert sorted(path.name[:13] for path in run.checkpoints.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_name_is_never_used_twice() -> None:
    assert checkpoint_name(5) != checkpoint_name(5)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, ("cluster.strategy=zero2",), "saved with cluster.strategy ddp, the job has zero2; resume with --set"),
        ({"strategy": "zero3", "world_size": 4}, ("cluster.strategy=zero3",), "saved by 4 workers, and zero3 cannot"),
        ({"fingerprint": "other"}, (), "trained on the blocks other, the job's are blocks"),
        (
            {},
            ("batch.global_size=16",),
            "saved with batch.global_size 8, the job has 16: after 10 steps it would go on",
        ),
        ({}, ("train.seed=1",), "saved with train.seed 42, the job has 1: after 10 steps it would go on with other"),
        ({"format_version": 9}, (), "has format 9, this version of clm-dist reads 1"),
        ({"unknown": 1}, (), "is no checkpoint that this version reads"),
    ],
)
def test_a_checkpoint_that_the_job_cannot_go_on_from_says_why(
    run: RunDir, make_job: MakeJob, change: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    import json

    name = share(run, 10)
    commit(run.checkpoints, name, keep=1)
    file = run.checkpoints / name / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_state(run.checkpoints / name, make_job(*settings), 2, "blocks")


def test_a_checkpoint_with_a_torn_state_is_none(run: RunDir, make_job: MakeJob) -> None:
    name = share(run, 10)
    (run.checkpoints / name / "trainer_state.json").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match="is no checkpoint that this version reads"):
        read_state(run.checkpoints / name, make_job(), 2, "blocks")


def test_ddp_goes_on_with_another_number_of_workers(run: RunDir, make_job: MakeJob) -> None:
    assert read_state(run.checkpoints / share(run, 10), make_job(), 7, "blocks").step == 10
