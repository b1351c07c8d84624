"""Where checkpoints lie, which of them count, and which are kept."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import CheckpointError, ConfigError
from clm_dist.files.checkpoints import Checkpoints, _scratch_dir
from clm_dist.files.hashes import file_sha256
from clm_dist.files.markers import Marker, RankFile, TrainerState, check_state, checkpoint_name
from clm_dist.files.run_dir import RunDir
from tests.conftest import MakeJob

STATE = TrainerState(10, 10, 2, "ddp", "blocks", global_size=8, seed=42, recent_losses=(1.5, 0.1))
MakeCheckpoints = Callable[[], Checkpoints]


@pytest.fixture(params=["directory", "s3", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCheckpoints:
    """Opens the same place anew each time, as another process would."""
    roots = {"directory": str(tmp_path / "a b[1]"), "s3": "s3://texts/runs/a b[1]", "memory": "memory://runs/x"}
    if request.param == "s3":
        request.getfixturevalue("bucket")
    root = roots[request.param]
    Checkpoints(root).remove_all()
    return lambda: Checkpoints(root)


def save(checkpoints: Checkpoints, step: int, *, eval_loss: float | None = None, keep: int = 9) -> str:
    name = write(checkpoints, step)
    share = RankFile("rank-00000.safetensors", 7, "", {"w": (0, 3)})
    marker = Marker(dataclasses.replace(STATE, step=step), (share,), eval_loss)
    checkpoints.commit(name, marker, keep)
    return name


def write(checkpoints: Checkpoints, step: int) -> str:
    """A checkpoint before its commit."""
    name = checkpoint_name(step)
    with checkpoints.writing(name, "rank-00000.safetensors") as file:
        file.write(b"content")
    return name


def test_a_checkpoint_counts_from_its_commit(make: MakeCheckpoints) -> None:
    assert make().committed() == []
    make().check_access()
    torn = write(make(), 40)
    assert make().committed() == []
    assert not make().is_committed(torn)
    names = [save(make(), step) for step in (100_000_001, 20, 3)]
    assert make().committed() == names[::-1]
    marker = make().read(names[1])
    assert dataclasses.replace(marker, time=0.0) == Marker(
        dataclasses.replace(STATE, step=20), (RankFile("rank-00000.safetensors", 7, "", {"w": (0, 3)}),)
    )
    assert marker.time > 1.7e9
    assert torn in make().directories()
    make().remove_uncommitted()
    assert torn not in make().directories()
    assert len(make().committed()) == 3
    make().remove_all()
    assert make().directories() == {}


def test_a_file_is_checked_before_it_is_read(make: MakeCheckpoints, tmp_path: Path) -> None:
    name = write(make(), 1)
    content = tmp_path / "content"
    content.write_text("content")
    share = RankFile("rank-00000.safetensors", 7, file_sha256(content), {"w": (0, 3)})
    with make().reading(name, share) as path:
        assert path.read_text() == "content"
    damaged, missing = dataclasses.replace(share, sha256="0"), dataclasses.replace(share, file="rank-00001")
    for wrong, message in ((damaged, "safetensors is not as it was written"), (missing, "rank-00001 is missing")):
        with pytest.raises(CheckpointError, match=message), make().reading(name, wrong):
            pass


def test_the_newest_and_the_best_are_kept(make: MakeCheckpoints) -> None:
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.0, 60: 2.5}
    for step, loss in losses.items():
        save(make(), step, eval_loss=loss, keep=2)
    steps = [marker.state.step for marker in make().readable().values()]
    assert steps == [20, 50, 60]
    # The untouched model is not what training found, however good it was.
    save(make(), 0, eval_loss=0.1, keep=9)
    save(make(), 70, eval_loss=0.5, keep=2)
    assert [marker.state.step for marker in make().readable().values()] == [60, 70]


def test_a_name_is_never_used_twice() -> None:
    assert checkpoint_name(5) != checkpoint_name(5)


def marked(tmp_path: Path, text: str) -> tuple[Checkpoints, str]:
    checkpoints = Checkpoints(str(tmp_path))
    name = save(checkpoints, 10)
    (tmp_path / name / "committed.json").write_text(text)
    return checkpoints, name


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path) -> None:
    checkpoints, name = marked(tmp_path, '{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"has format 1, this version of clm-dist reads 2; go on with the"):
        checkpoints.read(name)
    # It is not taken for one to remove, nor does it stop the others.
    newer = save(checkpoints, 20, keep=2)
    assert checkpoints.committed() == [name, newer]
    assert list(checkpoints.readable()) == [newer]


@pytest.mark.parametrize("text", ["", '{"format_version": 2', '{"format_version": 2}', "[]", "7"])
def test_a_marker_that_is_damaged_says_so(tmp_path: Path, text: str) -> None:
    checkpoints, name = marked(tmp_path, text)
    with pytest.raises(CheckpointError, match=r"committed.json is damaged"):
        checkpoints.read(name)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"fingerprint": "other"}, (), "here was trained on the blocks other, the job's are blocks"),
        (
            {},
            ("batch.global_size=16",),
            "saved with batch.global_size 8, the job has 16: after 10 steps it would go on",
        ),
        ({}, ("train.seed=1",), "saved with train.seed 42, the job has 1: after 10 steps it would go on with other"),
    ],
)
def test_a_checkpoint_that_the_job_cannot_go_on_from_says_why(
    make_job: MakeJob, change: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_state(dataclasses.replace(STATE, **change), "here", make_job(*settings), "blocks")


def test_any_strategy_and_number_of_workers_goes_on(make_job: MakeJob) -> None:
    check_state(STATE, "here", make_job("cluster.strategy=zero3", "cluster.workers=1"), "blocks")


def test_a_place_that_cannot_be_written_is_named(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write"):
        Checkpoints(str(tmp_path / "file" / "x")).check_access()
    with pytest.raises(ConfigError, match=r"checkpoint.path nosuch://x/tiny: .*; check the address"):
        Checkpoints.of_run(make_job("checkpoint.path=nosuch://x"), RunDir(tmp_path)).check_access()


def test_a_job_says_where_its_checkpoints_lie(make_job: MakeJob, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "tiny")
    assert Checkpoints.of_run(make_job(), run).root == str(run.checkpoints)
    assert Checkpoints.of_run(make_job(f"checkpoint.path={tmp_path}/x/"), run).root == f"{tmp_path}/x/tiny"


def test_what_a_killed_process_fetched_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {"dead": "clm-dist-fetched-99999999-x", "alive": f"clm-dist-fetched-{os.getppid()}-x", "other": "other-1-x"}
    for name in names.values():
        (tmp_path / name).mkdir()
    with _scratch_dir() as directory:
        assert directory.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {names["alive"], names["other"], directory.name}
    assert not directory.exists()


def test_a_damaged_checkpoint_that_is_set_aside_counts_no_more_and_stays(make: MakeCheckpoints) -> None:
    name, whole = save(make(), 20), save(make(), 10)
    make().set_aside(name)
    assert make().committed() == [whole]
    make().remove_uncommitted()
    assert make().directories()[name] == {"rank-00000.safetensors", "damaged.json"}
