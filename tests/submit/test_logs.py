"""`clm-dist logs`: one text from the driver and all hosts, in the order of time."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from clm_dist.errors import SubmitError
from clm_dist.submit import logs
from clm_dist.submit.slurm.logs import HostLogs
from tests.support.fakes import Commands, FakeSlurm, submission


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def fill(files: Path) -> None:
    write(files / "log", "2026-01-01 10:00:00 a", "of a", "2026-01-01 10:00:05 b", "2026-01-01 10:00:09 c")
    write(files / "nodes" / "n1.log", "2026-01-01 10:00:01 up", "2026-01-01 10:00:07 down", "of down")
    write(files / "nodes" / "n2.log", "2026-01-01 10:00:03 up")


MERGED = [
    "[driver] 2026-01-01 10:00:00 a",
    "[driver] of a",
    "[n1] 2026-01-01 10:00:01 up",
    "[n2] 2026-01-01 10:00:03 up",
    "[driver] 2026-01-01 10:00:05 b",
    "[n1] 2026-01-01 10:00:07 down",
    "[n1] of down",
    "[driver] 2026-01-01 10:00:09 c",
]


def test_lines_of_all_hosts_are_in_the_order_of_their_times(commands: Commands) -> None:
    commands.submit()
    fill(commands.files())
    said = commands.call("logs")
    assert (said.code, said.out.splitlines()) == (0, MERGED)


@pytest.mark.parametrize("last", [0, 1, 3, 8, 100])
def test_only_the_last_lines_are_printed_where_that_is_asked(commands: Commands, last: int) -> None:
    commands.submit()
    fill(commands.files())
    assert commands.call("logs", "-n", last).out.splitlines() == MERGED[max(0, 8 - last) :]


def test_a_submission_without_logs_prints_nothing(commands: Commands) -> None:
    commands.submit()
    assert (commands.call("logs").code, commands.call("logs", "-n", 5).out) == (0, "")


def test_what_looks_like_markup_or_is_no_text_is_printed(commands: Commands) -> None:
    commands.submit()
    (commands.files() / "log").write_bytes(b"[red]x[/red] \xff {} %s\n")
    assert commands.call("logs").out == "[driver] [red]x[/red] \ufffd {} %s\n"


def test_a_line_is_shown_once_it_is_whole_and_once_only(tmp_path: Path) -> None:
    merged = HostLogs(submission(tmp_path))
    log = merged.submission.files(0).log
    write(log, "one")
    with log.open("a") as file:
        file.write("tw")
    assert merged.new_lines() == ["[driver] one"]
    assert merged.new_lines() == []
    write(log, "o")
    write(merged.submission.files(0).nodes / "late.log", "here")
    assert sorted(merged.new_lines()) == ["[driver] two", "[late] here"]


def test_runs_of_a_sweep_are_named_in_front_of_the_host(tmp_path: Path) -> None:
    one = submission(tmp_path, run_names=("a-1", "a-2"), sweep=True)
    write(one.root / "log", "2026-01-01 10:00:00 prepared")
    write(one.files(0).log, "2026-01-01 10:00:01 x")
    write(one.files(1).nodes / "n1.log", "2026-01-01 10:00:02 y")
    assert HostLogs(one).new_lines() == [
        "[prepare] 2026-01-01 10:00:00 prepared",
        "[a-1 driver] 2026-01-01 10:00:01 x",
        "[a-2 n1] 2026-01-01 10:00:02 y",
    ]


def test_what_a_job_wrote_before_it_ended_is_not_missed(tmp_path: Path) -> None:
    merged = HostLogs(submission(tmp_path))

    def ended() -> bool:
        write(merged.submission.files(0).log, "last")
        return False

    assert list(logs.follow(merged.new_lines, ended)) == ["[driver] last"]


def test_following_ends_with_the_job_and_prints_its_last_lines(
    commands: Commands, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.submit()
    write(commands.files() / "log", "first")
    slurm.job(101, "JobState=RUNNING Reason=None NodeList=n1")
    sleeps: list[float] = []

    def work(seconds: float) -> None:
        """What the job does while nobody looks: a line, then another and the end."""
        sleeps.append(seconds)
        if len(sleeps) == 1:
            write(commands.files() / "log", "second")
        elif len(sleeps) == 2:
            write(commands.files() / "log", "last")
            slurm.job(101, "JobState=COMPLETED Reason=None ExitCode=0:0")
        assert len(sleeps) < 4, "the job has ended, and logs -f has not"

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=work, monotonic=lambda: 9.0 * len(sleeps)))
    said = commands.call("logs", "-f")
    assert said.out.splitlines() == ["[driver] first", "[driver] second", "[driver] last"]
    assert sleeps == [1.0, 1.0, 0]


def test_following_outlives_a_controller_that_is_away_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[SubmitError | bool] = iter(
        [SubmitError("scontrol refused: Unable to contact slurm controller"), False]
    )

    def active() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    ticks = iter(range(0, 100, 10))
    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: next(ticks)))
    assert list(logs.follow(HostLogs(submission(tmp_path)).new_lines, active)) == []
    assert next(answers, None) is None
