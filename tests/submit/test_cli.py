"""`clm-dist submit slurm`: what is queued, what is refused, and what a person is told."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clm_dist.config.load import job_text, load_job
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.slurm import backend
from clm_dist.submit.slurm.backend import local_places
from clm_dist.submit.submission import Submission
from tests.support.disks import mode
from tests.support.fakes import Commands, FakeSlurm, request_of, submission


def test_a_submission_leaves_job_and_script_and_says_its_number(commands: Commands, slurm: FakeSlurm) -> None:
    said = commands.submit("--time", "2:00:00", "--partition", "gpu", "--gpus-per-node", 4, "--set", "train.seed=7")
    assert said.code == 0, said.err
    assert said.out.splitlines() == [
        "submitted tiny as job 101",
        "clm-dist status tiny · clm-dist logs -f tiny · clm-dist cancel tiny",
    ]
    files = commands.files()
    assert slurm.calls("sbatch") == [["--parsable", str(files / "script")]]
    script = (files / "script").read_text()
    for line in ("--time=2:00:00", "--partition=gpu", "--gpus-per-node=4", f"--output='{files}/log'"):
        assert f"\n#SBATCH {line}\n" in script
    job = load_job(files / "job.yaml").config
    assert (job.train.seed, job.cluster.slurm.time, job.cluster.slurm.gpus_per_node) == (7, "2:00:00", 4)
    one = Submission.read(files)
    assert (one.job_id, one.prepare_id, one.run_names, one.sweep) == ("101", None, ("tiny",), False)


def test_nobody_else_may_read_what_is_submitted(commands: Commands) -> None:
    files = commands.files()
    files.mkdir(parents=True)
    for name in ("job.yaml", "script", "prepare-script"):
        (files / name).touch(0o666)
    assert commands.submit("--prepare-first").code == 0
    modes = {path.name: mode(path) for path in files.iterdir() if path.is_file()}
    assert modes == dict.fromkeys(("job.yaml", "script", "prepare-script", "submission.json"), 0o600)
    assert mode(files) == 0o700


def test_a_dry_run_prints_what_is_submitted_and_asks_nobody(commands: Commands, slurm: FakeSlurm) -> None:
    for name in ("sbatch", "sinfo", "scontrol", "scancel"):
        slurm.remove(name)
    said = commands.submit("--dry-run", "--partition", "nowhere")
    assert (said.code, said.err) == (0, "")
    assert not commands.runs.exists()
    slurm.install("sbatch", "sinfo", "scontrol", "scancel")
    slurm.answer("sinfo", "nowhere|(null)\n")
    commands.submit("--partition", "nowhere")
    assert (commands.files() / "script").read_text() == said.out


def test_a_dry_run_prints_the_job_that_prepares_first(commands: Commands) -> None:
    said = commands.submit("--dry-run", "--prepare-first")
    assert said.out.index("#SBATCH --job-name=tiny-prepare\n") < said.out.index("#SBATCH --job-name=tiny\n")
    assert said.out.count("#!/bin/bash") == 2


def test_without_sbatch_nothing_is_written(commands: Commands, slurm: FakeSlurm) -> None:
    slurm.remove("sbatch")
    said = commands.submit()
    assert (said.code, "error: sbatch is not on the PATH" in said.err) == (2, True)
    assert not commands.runs.exists()


def test_sbatch_s_refusal_is_shown_and_nothing_counts_as_submitted(commands: Commands, slurm: FakeSlurm) -> None:
    slurm.refuse("sbatch", "sbatch: error: [bold]AssocGrpSubmitJobsLimit[/bold]\nsbatch: error: second line")
    said = commands.submit()
    assert said.code == 2
    assert said.err.endswith(
        "error: sbatch refused: sbatch: error: [bold]AssocGrpSubmitJobsLimit[/bold]\nsbatch: error: second line\n"
    )
    assert commands.call("logs").err.startswith(f"error: nothing was submitted from {commands.runs}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time", "2h"), "cluster.slurm.time is '2h': not a time of Slurm"),
        (("--nodes", 0), "cluster.slurm.nodes is 0: input should be greater than 0"),
        (("--option", "output=x"), "output is set by clm-dist"),
        (("--option", "nodes=3"), "nodes has a field of its own: nodes"),
        (("--partition", "gup"), "cluster.slurm.partition: the partition gup does not exist; there are cpu, gpu\n"),
        (("--option", "gres=gpu:a100:9"), ": --gpus-per-node 9, and a node of this cluster has 8 at most"),
        (("--option", "gres=gpu:2:x"), "gpu:2:x is not understood; write gres=gpu:2"),
        (("--gpus-per-node", "many"), "cluster.slurm.gpus_per_node is 'many': not a number of GPUs"),
        (("--gpus-per-node", 9), ": --gpus-per-node 9, and a node of this cluster has 8 at most"),
        (
            ("--set", "cluster.workers=2", "--set", "batch.global_size=16", "--partition", "gpu", "--gpus-per-node", 1),
            "take --nodes 2 or --set cluster.workers=1",
        ),
        (("--at-once", 2), "--at-once is only for --array; remove it"),
        (("--array", "lr=1,2"), "--array lr=1,2: lr is not a field of a job"),
        (
            ("--array", "train.seed=1,2,1"),
            "--array: two of its runs would be named tiny-seed-1; give values that differ",
        ),
        (("--array", "cluster.slurm.nodes=1,2"), "--array: its runs ask Slurm for different things"),
        (("--array", "cluster.cpus_per_worker=1,2"), "--array: its runs ask Slurm for different things"),
        (("--set", "train.epoch=3"), "--set train.epoch=3: unknown key train.epoch; did you mean epochs?"),
        (("--array", "seed=1,2"), "--array seed=1,2: seed could be data.seed, train.seed; write one of them"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(
    commands: Commands, slurm: FakeSlurm, options: tuple[object, ...], message: str
) -> None:
    said = commands.submit(*options)
    assert said.code == 2
    assert said.err.startswith("error: --")
    assert message in said.err
    assert slurm.calls("sbatch") == []
    assert not commands.runs.exists()


def test_options_are_passed_through_as_they_are(commands: Commands, slurm: FakeSlurm) -> None:
    said = commands.submit("--option", 'comment=it\'s # 5% "x" \\', "--option", "exclusive", "--option", "begin=16:00")
    assert said.code == 0, said.err
    lines = (commands.files() / "script").read_text().splitlines()
    assert {"#SBATCH --exclusive", "#SBATCH --begin=16:00"} <= set(lines)
    assert """#SBATCH --comment='it'"'"'s # 5% "x" \\\\'""" in lines


def test_a_second_submission_of_a_queued_run_is_refused(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit()
    slurm.job(101, "JobState=PENDING Reason=Resources")
    said = commands.submit("--overwrite")
    assert said.code == 2
    assert "tiny is queued or running already, as job 101; see it with `clm-dist status tiny`" in said.err
    assert "end it with `clm-dist cancel tiny`, or make another run with --set name=..." in said.err
    assert len(slurm.calls("sbatch")) == 1
    # Another run is no second one, and a job that has ended is in nobody's way.
    assert commands.submit("--set", "name=other").code == 0
    slurm.job(101, "JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0")
    assert commands.submit().out.startswith("submitted tiny as job 103")


def finish(commands: Commands, slurm: FakeSlurm, finished_run: RunDir) -> Path:
    """A run that is done, and of which Slurm knows nothing any more."""
    commands.submit()
    slurm.forget(101)
    run = commands.runs / "tiny"
    shutil.copytree(finished_run.root, run)
    (run / "job.yaml").write_text(job_text(load_job(commands.job).config))
    return run


def test_a_run_that_is_done_is_refused_and_stays(commands: Commands, slurm: FakeSlurm, finished_run: RunDir) -> None:
    run = finish(commands, slurm, finished_run)
    said = commands.submit()
    assert said.code == 2
    assert f"the run {run} is done already; start it again with --overwrite, or make another run" in said.err
    assert (len(slurm.calls("sbatch")), (run / "result.json").exists()) == (1, True)


def test_overwrite_removes_the_run_once_sbatch_has_taken_the_job(
    commands: Commands, slurm: FakeSlurm, finished_run: RunDir
) -> None:
    run = finish(commands, slurm, finished_run)
    slurm.refuse("sbatch", "sbatch: error: no", call=2)
    assert commands.submit("--overwrite").code == 2
    assert (run / "result.json").exists()
    assert commands.submit("--overwrite").code == 0
    assert not run.exists()
    assert (commands.files() / "submission.json").exists()
    # It does not start before the run is removed.
    assert "--hold" in slurm.calls("sbatch")[-1]
    assert slurm.calls("scontrol")[-1] == ["release", "103"]


def test_a_run_that_cannot_be_removed_takes_its_new_job_with_it(
    commands: Commands, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, finished_run: RunDir
) -> None:
    finish(commands, slurm, finished_run)
    slurm.job(102, "JobState=PENDING Reason=JobHeldUser")

    def fail(job: object, run: object) -> None:
        raise ConfigError("the storage is away")

    monkeypatch.setattr(backend, "remove_run", fail)
    said = commands.submit("--overwrite")
    assert (said.code, "the storage is away" in said.err) == (2, True)
    assert slurm.calls("scancel") == [["102"]]
    assert not [call for call in slurm.calls("scontrol") if call[0] == "release"]


def test_a_run_with_another_job_goes_on_with_resume(commands: Commands, slurm: FakeSlurm, finished_run: RunDir) -> None:
    finish(commands, slurm, finished_run)
    said = commands.submit("--set", "train.epochs=9")
    assert "exists with another job (different: train.epochs)" in said.err
    assert commands.submit("--set", "train.epochs=9", "--resume").code == 0
    assert "-m clm_dist run --resume " in (commands.files() / "script").read_text()


def test_the_job_waits_for_the_one_that_prepares(commands: Commands, slurm: FakeSlurm) -> None:
    said = commands.submit("--prepare-first")
    assert said.out.startswith("submitted tiny as job 102 after job 101, which prepares\n")
    first, second = slurm.calls("sbatch")
    assert first == ["--parsable", str(commands.files() / "prepare-script")]
    chained = ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"]
    assert second == ["--parsable", *chained, str(commands.files() / "script")]
    assert Submission.read(commands.files()).prepare_id == "101"


def test_a_dependency_of_one_s_own_comes_on_top(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit("--prepare-first", "--option", "dependency=afterany:7")
    assert "--dependency=afterok:101,afterany:7" in slurm.calls("sbatch")[1]
    commands.submit("--set", "name=other", "--option", "dependency=afterany:7")
    assert "#SBATCH --dependency=afterany:7\n" in (commands.files("other") / "script").read_text()


def test_a_refused_job_takes_the_one_that_prepares_with_it(commands: Commands, slurm: FakeSlurm) -> None:
    slurm.refuse("sbatch", "sbatch: error: no GPUs for you", call=2)
    said = commands.submit("--prepare-first")
    assert (said.code, "sbatch: error: no GPUs for you" in said.err) == (2, True)
    assert slurm.calls("scancel") == [["101"]]
    assert not (commands.files() / "submission.json").exists()


def test_places_on_one_host_s_disk_are_warned_of(commands: Commands) -> None:
    said = commands.submit()
    for option, place in (("--runs", commands.runs), ("--store", commands.store)):
        assert (
            f"warning: {option} {place} looks like a disk of this host alone, and every node must see it;" in said.err
        )
    shared = request_of(submission(), store="s3://bucket/tmp")
    assert local_places(shared) == []
    assert local_places(request_of(submission(), store="/tmpfoo/store")) == []
    assert local_places(request_of(submission(Path("/local/runs")))) == ["--runs /local/runs"]
    assert local_places(request_of(submission(), store="/tmp")) == ["--store /tmp"]


def test_gpus_that_are_missing_or_idle_are_warned_of(commands: Commands) -> None:
    without, idle = "no GPUs are asked for, so this trains on CPUs", "3 of the GPUs stay idle: cluster.workers is 1"
    said = commands.submit()
    assert (without in said.err, "idle" in said.err) == (True, False)
    said = commands.submit("--set", "name=other", "--partition", "gpu", "--gpus-per-node", 4)
    assert (without in said.err, idle in said.err) == (False, True)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\tb"])
def test_a_directory_that_sbatch_cannot_write_to_is_refused(commands: Commands, slurm: FakeSlurm, name: str) -> None:
    said = replace(commands, runs=commands.runs / name).submit()
    assert said.code == 2
    assert "has a backslash or a line break, and Slurm cannot write a log to such a path; name another" in said.err
    assert slurm.calls("sbatch") == []


def test_a_sweep_of_a_name_that_is_queued_is_refused_though_its_runs_are_others(
    commands: Commands, slurm: FakeSlurm
) -> None:
    commands.submit("--array", "learning_rate=1e-5,2e-5")
    slurm.job(101, "JobState=PENDING ArrayJobId=101 ArrayTaskId=0-1 Reason=Priority")
    said = commands.submit("--array", "learning_rate=5e-5,6e-5")
    assert (said.code, len(slurm.calls("sbatch"))) == (2, 1)
    assert "tiny is queued or running already, as job 101" in said.err


def test_a_job_that_fails_at_once_is_not_taken_for_the_run_that_it_goes_on_with(
    commands: Commands, slurm: FakeSlurm, finished_run: RunDir
) -> None:
    run = finish(commands, slurm, finished_run)
    os.utime(run / "result.json", (1, 1))
    commands.submit("--set", "train.epochs=9", "--resume")
    slurm.job(102, "JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0")
    said = commands.call("status").out
    assert " failed " in said
    assert "tiny: exit code 2\nwhy: clm-dist logs tiny" in said


def test_a_tracker_that_is_not_installed_here_is_warned_of(commands: Commands) -> None:
    said = commands.submit("--set", "tracking=[tensorboard, wandbb]")
    assert said.code == 0
    assert "warning: tracking wandbb is offered by no installed package" in said.err
    assert "did you mean wandb? " in said.err
    assert "tracking" not in commands.submit("--set", "tracking=[wandb]", "--set", "name=other").err
