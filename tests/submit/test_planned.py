"""A plan on its way from `submit --plan` to the report of the run and to `status`."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from clm_dist.config.load import load_job, read_saved_job
from clm_dist.errors import ConfigError, StorageError
from clm_dist.files.atomic import write_json
from clm_dist.files.plan_file import PlanFile, read_plan
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run, remove_run
from clm_dist.submit.in_pod.driver import keep_plan
from clm_dist.submit.in_pod.pod import PLAN
from clm_dist.submit.k8s.backend import Launch
from clm_dist.submit.k8s.request import Request
from clm_dist.submit.training import Training
from tests.conftest import MakeJob, WriteJob
from tests.submit.test_launch import running
from tests.submit.test_pod_driver import drive, log_of
from tests.submit.test_pod_submitter import wait_until
from tests.support.command import Said, cells
from tests.support.fakes import Commands, FakeSlurm
from tests.support.leases import leased_elsewhere
from tests.support.plans import plan_of, plan_run

# Two hosts with a worker each.
TWO = ("cluster.slurm.nodes=2", "cluster.slurm.gpus_per_node=1", "cluster.workers=2", "train.precision=bf16")


@pytest.fixture
def plannable(commands: Commands, write_job: WriteJob, stores: Path) -> Commands:
    """Whose job is planned in a moment."""
    return replace(commands, job=write_job(*TWO), store=stores)


def submit(commands: Commands, *options: object) -> Said:
    said = commands.submit("--plan", "a100-80", "--partition", "gpu", *options)
    assert said.code == 0, said.err
    return said


def plan_in(run: Path) -> PlanFile:
    plan = read_plan(RunDir(run))
    assert isinstance(plan, dict)
    return plan


def test_the_plan_of_a_submission_lies_where_the_report_of_its_run_looks(plannable: Commands) -> None:
    submit(plannable)
    plan = plan_in(plannable.runs / "tiny")
    assert (plan["device"], plan["workers"], [size["workers"] for size in plan["sizes"]]) == ("a100-80", 2, [2])
    # It is a run that has not begun, for the command that the job runs.
    job = load_job(plannable.files() / "job.yaml").config
    assert find_run(job, plannable.runs) == (RunDir(plannable.runs / "tiny"), False)
    assert plannable.call("report", plannable.runs / "tiny").code == 2


def test_a_dry_run_and_a_refusal_keep_no_plan(plannable: Commands, slurm: FakeSlurm) -> None:
    submit(plannable, "--dry-run")
    slurm.refuse("sbatch", "sbatch: error: no")
    assert plannable.submit("--plan", "a100-80", "--partition", "gpu").code == 2
    assert not (plannable.runs / "tiny").exists()


def test_each_run_of_a_sweep_has_the_plan_of_its_setting(plannable: Commands) -> None:
    said = submit(plannable, "--array", "max_steps=3,5")
    names = ("tiny-max_steps-3", "tiny-max_steps-5")
    assert [plan_in(plannable.runs / name)["steps"]["value"] for name in names] == [3, 5]
    assert said.err.count("memory of a100-80") == 1


def test_a_plan_that_cannot_be_kept_ends_no_submission(
    plannable: Commands, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("clm_dist.submit.slurm.backend.write_plan", fail)
    assert submit(plannable).out.startswith("submitted tiny as job 101\n")
    assert "the plan of tiny is not kept: the disk is full" in caplog.text


def test_overwriting_a_run_keeps_the_plan_of_the_one_that_comes(run: RunDir, make_job: MakeJob) -> None:
    plan_run(run)
    remove_run(make_job(), run)
    assert [path.name for path in run.root.iterdir()] == ["plan.json"]
    run.plan.unlink()
    remove_run(make_job(), run)
    assert not run.root.exists()


def test_a_run_that_cannot_be_removed_is_named(run: RunDir, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_run(run)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ConfigError, match=rf"^cannot write {run.root}: Permission denied; name a directory "):
        remove_run(make_job(), run)


def test_status_of_a_submission_stands_beside_its_plan(plannable: Commands, slurm: FakeSlurm, run: RunDir) -> None:
    submit(plannable)
    slurm.job(101, running("n[1-2]", 7200))
    assert "no time" in plannable.call("status").out
    target = RunDir(plannable.runs / "tiny")
    target.job.write_bytes(run.job.read_bytes())
    target.metrics.write_bytes(run.metrics.read_bytes())
    plan_run(target)
    said = plannable.call("status").out
    assert cells(said, "tiny")[5] == "24/24"
    assert "\ntiny: planned 1 min 40 s (1 min 30 s to 2 min); at this speed " in said


@pytest.mark.parametrize(
    ("job", "end"),
    [
        (running("n[1-2]", 7200), "done in "),
        ("JobState=NODE_FAIL Reason=NodeDown", "of which "),
        (None, "of which "),
    ],
    # What is collected must be the same in every process, and the first has the time of day.
    ids=["running", "lost", "forgotten"],
)
def test_only_a_job_that_runs_is_about_to_be_done(
    plannable: Commands, slurm: FakeSlurm, run: RunDir, job: str | None, end: str
) -> None:
    """Whatever the lease says, which a killed job leaves."""
    submit(plannable)
    slurm.job(101, job) if job else slurm.forget(101)
    target = RunDir(plannable.runs / "tiny")
    target.job.write_bytes(run.job.read_bytes())
    target.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:-12]))
    plan_run(target)
    with leased_elsewhere(target.root):
        said = plannable.call("status").out
    line = next(line for line in said.splitlines() if line.startswith("tiny: planned "))
    assert line.partition("; at this speed ")[2].partition(", ")[2].startswith(end)


def test_a_submission_that_waits_is_not_judged_by_the_run_before_it(
    plannable: Commands, slurm: FakeSlurm, run: RunDir
) -> None:
    plannable.runs.mkdir()
    target = RunDir(run.root.rename(plannable.runs / "tiny"))
    write_json(target.result, {"status": "failed"})
    for path in (target.job, target.result):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    submit(plannable, "--resume")
    plan_run(target)
    slurm.job(101, "JobState=PENDING Reason=Priority")
    said = plannable.call("status").out
    assert cells(said, "tiny")[2] == "pending"
    assert "\ntiny: planned 1 min 40 s (1 min 30 s to 2 min)\n" in said


def test_pods_get_the_plan_beside_the_job(make_job: MakeJob, run: RunDir, tmp_path: Path) -> None:
    job = make_job("cluster.k8s.image=i", "cluster.k8s.claim=c")
    plan_run(run)
    plan = plan_in(run.root)
    launch = Launch(job, Request(), tmp_path, plan)
    (config_map,) = (made for made in launch.objects if made["kind"] == "ConfigMap")
    assert set(config_map["data"]) == {"job.yaml", PLAN}
    (plain,) = (made for made in replace(launch, plan=None).objects if made["kind"] == "ConfigMap")
    assert set(plain["data"]) == {"job.yaml"}
    (tmp_path / PLAN).write_text(config_map["data"][PLAN])
    new = RunDir(tmp_path / "runs" / "tiny")
    keep_plan(tmp_path / PLAN, job, new, accepts_other=False)
    assert plan_in(new.root) == plan
    # None was submitted; and one that cannot be kept ends nothing.
    keep_plan(tmp_path / "none", job, RunDir(tmp_path / "other"), accepts_other=False)
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    keep_plan(tmp_path / PLAN, job, RunDir(tmp_path / "file" / "run"), accepts_other=False)


def test_a_run_that_refuses_the_job_of_a_pod_keeps_its_plan(make_job: MakeJob, run: RunDir, tmp_path: Path) -> None:
    plan_run(run)
    (tmp_path / PLAN).write_text(json.dumps(plan_of(run, version="later")))
    job, other = read_saved_job(run.job), make_job("train.max_steps=3")
    for submitted, accepts_other, version in ((other, False, "0.1.0"), (job, False, "later"), (other, True, "later")):
        plan_run(run)
        keep_plan(tmp_path / PLAN, submitted, run, accepts_other=accepts_other)
        assert plan_in(run.root)["version"] == version


def test_a_pod_says_how_the_run_stands_beside_its_plan(run: RunDir, tmp_path: Path) -> None:
    """`status` does not see the claim: the line comes with the log."""
    target = RunDir(tmp_path / "run")
    target.root.mkdir()
    target.job.write_bytes(run.job.read_bytes())
    plan_run(target)
    records = tmp_path / "records"
    records.write_bytes(run.metrics.read_bytes())
    go = tmp_path / "go"
    done = """echo '{"status": "done"}' >$run/result.json"""
    wait = f"while [ ! -e {go} ]; do sleep 0.1; done"
    wrapper = drive(tmp_path, f"cat {records} >>$run/metrics.jsonl; {wait}; {done}")

    def told() -> Training | None:
        return Training.of_lines(log_of(tmp_path).splitlines())

    wait_until(lambda: told() is not None)
    planned = "planned 1 min 40 s (1 min 30 s to 2 min)"
    said = str(getattr(told(), "planned", None))
    assert said.startswith(f"{planned}; at this speed ")
    # The pod may be gone before it says another line.
    assert (", of which " in said, "done in" in said) == (True, False)
    # What is said last is how it ended, though no step was added.
    go.touch()
    wrapper.communicate(timeout=30)
    training = told()
    assert training
    assert str(training.planned).startswith(f"{planned}; took ")
    # Earlier versions read lines without it.
    fields = cast(dict[str, Any], json.loads(replace(training, planned=None).as_line().partition(": ")[2]))
    assert "planned" not in fields
