"""A final model that was lost or damaged after its run is found, and written again."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.final import find_damage
from clm_dist.files.hashes import HashMemory, changed_files
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run
from clm_dist.files.stores import Store
from clm_dist.progress import Silent
from clm_dist.train.ray import driver
from clm_dist.train.ray.cluster import Cluster
from tests.support.command import clm_dist


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # not a number
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", [cut, change, remove])
@pytest.mark.parametrize("command", [["generate", "--prompt", "The"], ["evaluate"], ["push"]])
def test_a_damaged_model_is_named_with_what_to_do(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damage: Damage, command: list[str]
) -> None:
    weights = run.final / "model.safetensors"
    damage(weights)
    said = clm_dist(capsys, monkeypatch, *command, run.root)
    problem = "is missing" if damage is remove else "is not as it was written"
    again = f"`clm-dist run {run.job} --runs {run.root.parent}` writes the model again from the run's last checkpoint"
    assert (said.code, said.err) == (2, f"error: {weights} {problem}; {again}\n")


@pytest.mark.parametrize("damage", [pytest.param(cut, marks=pytest.mark.slow), remove])
def test_a_run_whose_model_is_damaged_writes_the_same_again(
    run: RunDir,
    cluster: Cluster,
    prepared: Callable[[JobConfig], Path],
    caplog: pytest.LogCaptureFixture,
    damage: Damage,
) -> None:
    job = read_saved_job(run.job)
    before = {file.name: file.read_bytes() for file in run.final.iterdir()}
    result = read_json(run.result)
    assert find_run(job, run.root.parent) == (run, True)
    damage(run.final / "model.safetensors")
    assert find_run(job, run.root.parent) == (run, False)
    assert "model.safetensors is" in caplog.text
    assert "the model is written again from the last checkpoint" in caplog.text
    again = driver.train(job, run, Store(prepared(job)), cluster, Silent())
    assert find_run(job, run.root.parent) == (run, True)
    assert {file.name: file.read_bytes() for file in run.final.iterdir()} == before
    assert again["files"] == result["files"]
    assert again["evals"] == result["evals"]


def test_without_a_checkpoint_a_damaged_run_is_not_begun_anew(run: RunDir) -> None:
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigError, match=r"final is missing, and the run has no checkpoint .* with --overwrite"):
        find_run(read_saved_job(run.job), run.root.parent)


def test_the_card_may_change_and_a_result_without_hashes_is_taken(run: RunDir) -> None:
    (run.final / "README.md").write_text("mine")
    assert find_damage(run) is None
    (run.final / "config.json").write_text("{}")
    assert find_damage(run) == f"{run.final / 'config.json'} is not as it was written"
    result = read_json(run.result)
    del result["files"]
    write_json(run.result, result)
    assert find_damage(run) is None
    shutil.rmtree(run.final)
    assert find_damage(run) == f"{run.final} is missing"


def test_only_the_first_of_many_files_is_named(run: RunDir) -> None:
    num_files = len(read_json(run.result)["files"])
    for file in run.final.iterdir():
        file.unlink()
    damage = find_damage(run)
    assert damage
    assert damage.endswith(f"is missing (and {num_files - 1} more of its files are missing or changed)")


def test_a_model_is_read_once_unless_it_is_pushed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_damage(run) is None
    known = json.loads(run.hashes.read_text())
    assert known

    def fail(*_: Path) -> str:
        raise AssertionError("a file that is as it was is read again")

    monkeypatch.setattr("clm_dist.files.hashes.file_sha256", fail)
    assert find_damage(run) is None
    with pytest.raises(AssertionError):
        find_damage(run, read_all=True)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a").touch()
    monkeypatch.setattr("clm_dist.files.hashes.file_sha256", fail)
    assert changed_files(tmp_path, {"a": "abc"}) == {"a": "cannot be read (Permission denied)"}


def test_a_memory_of_hashes_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    memory = HashMemory(tmp_path / "a" / "hashes.json")
    memory.remember({tmp_path / "a": "abc"})
    assert memory.get(tmp_path / "a") == "abc"
