"""What a submission is called and where it lies; which runs a sweep has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import ConfigError
from clm_dist.submit.submission import Submission, find_submission, submissions, sweep_name, sweep_settings
from tests.support.fakes import submission


def written(runs: Path, name: str, job_id: str | None, submitted: float, **values: Any) -> Submission:
    one = submission(runs, name, job_id=job_id, submitted=submitted, **values)
    one.root.mkdir(parents=True)
    one.write()
    return one


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / 'it\'s "my" runs'


def test_a_submission_is_read_as_it_was_written(runs: Path) -> None:
    one = written(runs, "a", "12", 5.25, run_names=("a-1", "a-2"), sweep=True, prepare_id="11")
    assert Submission.read(one.root) == one
    assert submissions(runs) == [one]


def test_runs_that_were_moved_are_found_where_they_are_now(runs: Path, tmp_path: Path) -> None:
    one = written(runs, "a", "12", 5.0)
    moved = tmp_path / "moved"
    shutil.move(runs, moved)
    found, _ = find_submission(moved, "a")
    assert (found.runs, found.root, found.job_id) == (moved, moved / ".submitted" / "a", "12")
    assert found.root != one.root


def test_a_submission_is_found_by_name_run_or_number(runs: Path) -> None:
    sweep = written(runs, "sweep", "20", 1.0, run_names=("sweep-1", "sweep-2"), sweep=True, prepare_id="19")
    other = written(runs, "other", "30", 2.0)
    for which, task in {"sweep": None, "sweep-1": 0, "sweep-2": 1, "20": None, "20_1": 1, "19": None}.items():
        assert find_submission(runs, which) == (sweep, task)
    assert find_submission(runs, "other") == (other, None)
    assert find_submission(runs, None) == (other, None)
    assert submissions(runs) == [other, sweep]


def test_what_was_not_submitted_says_what_was(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nothing was submitted from .*; --runs names another directory, and `clm-"):
        find_submission(runs, None)
    with pytest.raises(ConfigError, match=r"^no submission a from [^(]*; --runs names another directory$"):
        find_submission(runs, "a")
    written(runs, "b", "12", 5.0)
    with pytest.raises(ConfigError, match=r"^no submission a from .* \(there: b\)$"):
        find_submission(runs, "a")


def test_what_sbatch_never_took_is_no_submission(runs: Path) -> None:
    written(runs, "a", None, 5.0)
    assert submissions(runs) == []


@pytest.mark.parametrize("text", ["{", "[1]", "3", "{}", '{"run_names": 3}', '{"run_names": ["a"], "colour": 1}'])
def test_a_damaged_file_is_named(runs: Path, text: str) -> None:
    one = written(runs, "a", "12", 5.0)
    path = one.root / "submission.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_submission(runs, "a")
    assert str(caught.value).startswith(f"{path} is damaged: ")


def test_the_file_holds_json_that_other_programs_read(runs: Path) -> None:
    one = written(runs, "a", "12", 5.0)
    values = json.loads((one.root / "submission.json").read_text())
    assert values["runs"] == str(runs)
    assert (values["name"], values["run_names"], values["job_id"]) == ("a", ["a"], "12")


def test_each_run_of_a_sweep_has_files_and_a_number_of_its_own(runs: Path) -> None:
    sweep = submission(runs, "a", job_id="12", run_names=("a-1", "a-2"), sweep=True)
    assert [sweep.task_id(task) for task in (0, 1)] == ["12_0", "12_1"]
    assert len({sweep.files(task).job for task in (0, 1)} | {sweep.files(task).log for task in (0, 1)}) == 4
    alone = submission(runs, "a", job_id="12")
    assert (alone.task_id(0), alone.files(0).root) == ("12", alone.root)


def test_a_sweep_is_every_combination_of_its_values() -> None:
    assert sweep_settings([]) == [[]]
    assert sweep_settings(["learning_rate=1e-5, 2e-5"]) == [["train.learning_rate=1e-5"], ["train.learning_rate=2e-5"]]
    assert sweep_settings(["train.seed=1,2", "block_size=64,128"]) == [
        ["train.seed=1", "data.block_size=64"],
        ["train.seed=1", "data.block_size=128"],
        ["train.seed=2", "data.block_size=64"],
        ["train.seed=2", "data.block_size=128"],
    ]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("learning_rate", "write it as field=value,value, e.g. learning_rate=1e-5,2e-5"),
        ("learning_rate=", "write it as field=value,value"),
        ("learning_rate=1e-5,,2e-5", "write it as field=value,value"),
        ("lr=1,2", "lr is not a field of a job"),
        ("seed=1,2", "seed could be data.seed, train.seed; write one of them"),
    ],
)
def test_a_wrong_sweep_says_what_would_be_right(sweep: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_settings([sweep])
    assert str(caught.value).startswith(f"--array {sweep}: {message}")


def test_names_of_a_sweep_s_runs_say_their_values_and_are_names_of_runs() -> None:
    assert sweep_name("eli5", ["train.learning_rate=1e-5"]) == "eli5-learning_rate-1e-5"
    assert sweep_name("eli5", ["train.seed=1", "data.block_size=64"]) == "eli5-seed-1-block_size-64"
    assert sweep_name("eli5", ["data.split=train[:50%] /x"]) == "eli5-split-train-50-x"
