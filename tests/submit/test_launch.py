"""`clm-dist status`: where a submission's runs are, from Slurm's answers and from what the runs have written."""

import time
from dataclasses import replace

import pytest

from clm_dist.files.atomic import write_json
from clm_dist.submit.launch import backend_of
from clm_dist.submit.submission import Submission
from tests.support.command import cells
from tests.support.fakes import Commands, FakeSlurm


def steps(first: int, last: int, seconds: float = 2.0) -> list[dict[str, object]]:
    return [{"kind": "step", "step": n, "loss": 5.0 - n / 100, "seconds": seconds} for n in range(first, last + 1)]


def running(hosts: str, left_s: float, restarts: int = 0) -> str:
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + left_s))
    return f"JobState=RUNNING Reason=None Restarts={restarts} EndTime={end} NodeList={hosts}"


def test_a_run_that_trains_shows_hosts_attempt_step_loss_and_what_is_left(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.job(101, running("n[1-2]", 7200.4, restarts=3))
    commands.add_metrics("tiny", {"kind": "start", "step": 0, "num_steps": 400}, *steps(1, 100))
    # Slower of late: the last steps tell what is left.
    commands.add_metrics("tiny", {"kind": "start", "step": 100, "num_steps": 400}, *steps(101, 180, seconds=3.0))
    run, job, state, hosts, attempt, step, loss, training, left = cells(commands.call("status").out, "tiny")
    assert (run, job, state, hosts, attempt) == ("tiny", "101", "running", "n[1-2]", "3")
    assert (step, loss, training) == ("180/400", "3.2000", "11:00")
    assert left.startswith(("2:00:", "1:59:"))


def test_a_run_that_resumes_shows_the_step_that_it_goes_on_from(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.job(101, running("n1", 60))
    commands.add_metrics("tiny", {"kind": "start", "step": 40, "num_steps": 400})
    row = cells(commands.call("status").out, "tiny")
    assert row[5:8] == ["40/400", "", ""]


def test_a_job_that_waits_says_why_in_words(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit("--prepare-first")
    slurm.job(101, "JobState=PENDING Reason=Priority")
    slurm.job(102, "JobState=PENDING Reason=Dependency NodeList=(null)")
    said = commands.call("status", "102")
    assert said.out.startswith("prepare (job 101): pending: jobs with a higher priority wait for the same nodes\n")
    assert cells(said.out, "tiny") == ["tiny", "102", "pending", "", "0", "", "", "", ""]
    assert said.out.endswith("tiny: waits for another job, such as the one that prepares\n")
    slurm.job(101, "JobState=COMPLETED Reason=None ExitCode=0:0")
    assert "prepare" not in commands.call("status").out.splitlines()[0]


def test_a_run_that_is_done_shows_no_time_left(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.job(101, "JobState=COMPLETED Reason=None ExitCode=0:0 Restarts=1 NodeList=n1 EndTime=2026-01-01T00:00:00")
    commands.add_metrics("tiny", {"kind": "start", "step": 0, "num_steps": 3}, *steps(1, 3))
    write_json(commands.runs / "tiny" / "result.json", {"status": "done"})
    row = cells(commands.call("status").out, "tiny")
    assert row == ["tiny", "101", "done", "n1", "1", "3/3", "4.9700", "", ""]


def test_a_job_that_slurm_has_forgotten_is_told_by_its_run(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.forget(101)
    said = commands.call("status")
    assert said.code == 0
    assert cells(said.out, "tiny")[2] == "ended, and Slurm has forgotten how"
    (commands.runs / "tiny").mkdir()
    write_json(commands.runs / "tiny" / "result.json", {"status": "preempted"})
    assert cells(commands.call("status").out, "tiny")[2] == "preempted"
    slurm.install("sacct")
    slurm.answer("sacct", "101|FAILED|3:0|n7\n")
    (commands.runs / "tiny" / "result.json").unlink()
    said = commands.call("status")
    assert cells(said.out, "tiny")[:5] == ["tiny", "101", "failed", "n7", ""]
    assert said.out.endswith("tiny: exit code 3\nwhy: clm-dist logs tiny -n 40\n")


def test_a_run_of_an_earlier_attempt_is_what_its_job_is_now(commands: Commands, slurm: FakeSlurm) -> None:
    """A run that was preempted has a result, and its job waits for the next attempt."""
    commands.submit()
    slurm.job(101, "JobState=PENDING Reason=BeginTime Restarts=1 NodeList=(null)")
    (commands.runs / "tiny").mkdir()
    write_json(commands.runs / "tiny" / "result.json", {"status": "preempted"})
    assert cells(commands.call("status").out, "tiny")[2:5] == ["pending", "", "1"]


def test_a_sweep_is_one_array_whose_runs_are_told_apart(commands: Commands, slurm: FakeSlurm) -> None:
    said = commands.submit("--array", "learning_rate=1e-5,2e-5,5e-5")
    assert said.out.startswith("submitted tiny as job 101\n")
    assert "#SBATCH --array=0-2\n" in (commands.files() / "script").read_text()
    slurm.job(
        101,
        "JobId=101 ArrayJobId=101 ArrayTaskId=2 JobState=PENDING Reason=JobArrayTaskLimit NodeList=(null)",
        "JobId=103 ArrayJobId=101 ArrayTaskId=1 " + running("n2", 60),
        "JobId=102 ArrayJobId=101 ArrayTaskId=0 JobState=COMPLETED Reason=None ExitCode=0:0 NodeList=n1",
    )
    first, second, third = (f"tiny-learning_rate-{value}" for value in ("1e-5", "2e-5", "5e-5"))
    for name in (first, third):
        (commands.runs / name).mkdir()
    write_json(commands.runs / first / "result.json", {"status": "done"})
    said = commands.call("status", second)
    assert cells(said.out, first)[:4] == [first, "101_0", "done", "n1"]
    assert cells(said.out, second)[:4] == [second, "101_1", "running", "n2"]
    assert cells(said.out, third)[:4] == [third, "101_2", "pending", ""]
    assert f"{third}: the sweep has reached its limit of running runs (--at-once)\n" in said.out
    assert "compare them" not in said.out
    write_json(commands.runs / third / "result.json", {"status": "done"})
    said = commands.call("status")
    assert said.out.endswith(f"compare them: clm-dist report {commands.runs / first} {commands.runs / third}\n")


def test_each_run_of_a_sweep_has_the_job_of_its_setting(commands: Commands) -> None:
    from clm_dist.config.load import load_job

    commands.submit("--array", "train.seed=1,2", "--array", "block_size=64,128")
    one = Submission.read(commands.files())
    jobs = [load_job(one.files(task).job).config for task in range(4)]
    assert [(job.train.seed, job.data.block_size) for job in jobs] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    assert tuple(job.name for job in jobs) == one.run_names
    assert len(set(one.run_names)) == 4


@pytest.mark.parametrize(
    ("prepare", "job", "active"),
    [("RUNNING", "PENDING", True), ("FAILED", "PENDING", True), ("COMPLETED", "COMPLETED", False), (None, None, False)],
)
def test_a_submission_is_active_while_one_of_its_jobs_is(
    commands: Commands, slurm: FakeSlurm, prepare: str | None, job: str | None, active: bool
) -> None:
    commands.submit("--prepare-first")
    for number, state in ((101, prepare), (102, job)):
        if state:
            slurm.job(number, f"JobState={state} Reason=None")
    one = Submission.read(commands.files())
    assert backend_of(one).is_active(one) == active


def test_a_controller_that_does_not_answer_may_be_asked_again(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.refuse("scontrol", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for command in ("status", "cancel"):
        said = commands.call(command)
        assert (said.code, said.out) == (75, "")
        assert said.err.startswith("error: scontrol refused: slurm_load_jobs error: Unable to contact slurm controller")


def test_a_run_without_metrics_has_no_progress(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.job(101, running("n1", 60))
    one = Submission.read(commands.files())
    (state,) = backend_of(one).status(one).runs
    assert state.training is None
    assert state.is_training
    assert not replace(state, result={"status": "done"}).is_training
