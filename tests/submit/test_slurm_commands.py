"""What Slurm is asked, and what is understood of its answers."""

import time
from pathlib import Path

import pytest

from clm_dist.config.slurm import PrepareJob, SlurmConfig
from clm_dist.errors import ClusterAwayError, ConfigError, SubmitError
from clm_dist.submit.slurm.commands import (
    cancel_job,
    check_cluster,
    describe_reason,
    job_states,
    num_gpus,
    submit_script,
)
from clm_dist.submit.states import JobState
from tests.support.fakes import FakeSlurm


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("(null)", 0),
        ("", 0),
        ("gpu:4", 4),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:4(S:0-1),gpu:v100:2", 6),
        ("gpu:a100_3g.20gb:2(S:0)", 2),
        ("shard:8,gpu:1", 1),
        ("nvme:2", 0),
    ],
)
def test_gpus_are_counted_as_sinfo_writes_them(gres: str, count: int) -> None:
    assert num_gpus(gres) == count


def test_a_partition_that_is_not_there_is_told_those_that_are(slurm: FakeSlurm) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cluster(SlurmConfig(partition="gup"), prepare_first=False)
    assert str(caught.value) == "cluster.slurm.partition: the partition gup does not exist; there are cpu, gpu"
    assert caught.value.field == "cluster.slurm.partition"
    # One of several is enough to be wrong.
    with pytest.raises(ConfigError, match="the partition gup does not exist"):
        check_cluster(SlurmConfig(partition="gpu,gup"), prepare_first=False)
    check_cluster(SlurmConfig(partition="gpu,cpu"), prepare_first=False)


def test_the_partition_of_the_job_that_prepares_is_looked_at_where_there_is_one(slurm: FakeSlurm) -> None:
    config = SlurmConfig(partition="gpu", prepare=PrepareJob(partition="old"))
    check_cluster(config, prepare_first=False)
    with pytest.raises(ConfigError, match="the partition old does not exist; there are cpu, gpu") as caught:
        check_cluster(config, prepare_first=True)
    assert caught.value.field == "cluster.slurm.prepare.partition"


def test_more_gpus_than_any_node_of_the_partition_has_are_refused(slurm: FakeSlurm) -> None:
    check_cluster(SlurmConfig(partition="gpu", gpus_per_node=8), prepare_first=False)
    with pytest.raises(ConfigError) as caught:
        check_cluster(SlurmConfig(partition="gpu", gpus_per_node=9), prepare_first=False)
    assert str(caught.value).startswith("--gpus-per-node 9, and a node of the partition gpu has 8 at most; take fewer")
    assert caught.value.field == "cluster.slurm.gpus_per_node"
    with pytest.raises(ConfigError, match="a node of the partition cpu has 0 at most"):
        check_cluster(SlurmConfig(partition="cpu", gpus_per_node=1), prepare_first=False)
    # Which partition a job gets that names none, the site or the environment may decide.
    check_cluster(SlurmConfig(gpus_per_node=8), prepare_first=False)
    with pytest.raises(ConfigError, match="a node of this cluster has 8 at most"):
        check_cluster(SlurmConfig(gpus_per_node=9), prepare_first=False)


def test_without_slurm_it_says_where_to_go(slurm: FakeSlurm) -> None:
    slurm.remove("sbatch")
    with pytest.raises(
        SubmitError, match=r"^sbatch is not on the PATH; run this on a login node of the cluster, or see the"
    ):
        check_cluster(SlurmConfig(), prepare_first=False)
    assert slurm.calls("sinfo") == []
    slurm.remove("scontrol")
    with pytest.raises(SubmitError, match=r"^scontrol is not on the PATH; run this on a login node"):
        job_states("5")


def script_of(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "it's a script"
    path.write_text("\n".join(["#!/bin/bash", *lines, "#SBATCH --after=the first command\n"]))
    return path


def test_a_refusal_is_shown_whole(slurm: FakeSlurm, tmp_path: Path) -> None:
    said = "sbatch: error: Batch job submission failed: Invalid account\nsbatch: error: and [more] of it"
    slurm.refuse("sbatch", said)
    with pytest.raises(SubmitError) as caught:
        submit_script(script_of(tmp_path))
    assert str(caught.value) == f"sbatch refused: {said}"


def test_a_script_is_submitted_by_its_path_and_its_number_comes_back(slurm: FakeSlurm, tmp_path: Path) -> None:
    script = script_of(tmp_path)
    assert submit_script(script, "--dependency=afterok:5") == "101"
    assert slurm.calls("sbatch") == [["--parsable", "--dependency=afterok:5", str(script)]]


def test_the_submitter_s_own_job_does_not_reach_into_the_new_one(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "9",
        "SLURM_CPUS_PER_TASK": "1",
        "SBATCH_PARTITION": "old",
        "SBATCH_JOB_NAME": "other",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_ERROR": "elsewhere",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_WAIT": "1",
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "here", "SBATCH_ACCOUNT": "me", "A": "it's\nkept"}
    for name, value in {**gone, **kept}.items():
        monkeypatch.setenv(name, value)
    submit_script(script_of(tmp_path, "#SBATCH --partition=gpu", "#SBATCH --job-name=a"))
    environment = slurm.environment("sbatch")
    assert not gone.keys() & environment.keys()
    assert {name: environment[name] for name in kept} == kept


def test_a_running_job_tells_hosts_attempt_and_time_left(slurm: FakeSlurm) -> None:
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600))
    slurm.job(
        101,
        "JobName=a JobState=RUNNING Reason=None Requeue=1 Restarts=2 ExitCode=0:0 "
        f"StartTime=2026-01-01T00:00:00 EndTime={end} ReqNodeList=(null) NodeList=n[1-2] "
        "Comment=was JobState=FAILED Restarts=9",
    )
    state = job_states("101")["101"]
    assert (state.state, state.reason, state.nodes, state.restarts) == ("RUNNING", "", "n[1-2]", 2)
    assert state.seconds_left == pytest.approx(3600, abs=5)
    assert state.active


def test_a_job_without_an_end_has_no_time_left(slurm: FakeSlurm) -> None:
    slurm.job(101, "JobState=RUNNING Reason=None EndTime=Unknown NodeList=n1")
    assert job_states("101")["101"].seconds_left is None


def test_a_requeued_job_waits_on_no_host(slurm: FakeSlurm) -> None:
    slurm.job(101, "JobState=PENDING Reason=BeginTime Restarts=1 ExitCode=0:0 EndTime=Unknown NodeList=(null)")
    (state,) = job_states("101").values()
    reason = "it was requeued or has a begin time, and starts later"
    assert state == JobState("PENDING", reason, "", 1, None)
    assert state.active


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("JobState=COMPLETED Reason=None ExitCode=0:0", ""),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0", "exit code 1"),
        ("JobState=FAILED Reason=None ExitCode=2:0", "exit code 2"),
        ("JobState=CANCELLED Reason=None ExitCode=0:15", "signal 15"),
        ("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:0", "TimeLimit"),
        ("JobState=NODE_FAIL Reason=None ExitCode=0:0", ""),
    ],
)
def test_a_job_that_has_ended_says_how(slurm: FakeSlurm, line: str, reason: str) -> None:
    slurm.job(101, f"{line} NodeList=n1")
    state = job_states("101")["101"]
    assert (state.active, state.reason) == (False, reason)


@pytest.mark.parametrize(
    ("tasks", "waiting"),
    [
        ("0-2,5%4", {0, 1, 2, 5}),
        ("3", {3}),
        ("0-1", {0, 1}),
        ("1,3%1", {1, 3}),
        ("0-6:2", {0, 2, 4, 6}),
        ("1-7:3%2", {1, 4, 7}),
    ],
)
def test_tasks_of_an_array_that_wait_are_told_apart(slurm: FakeSlurm, tasks: str, waiting: set[int]) -> None:
    slurm.job(
        20,
        f"JobId=20 ArrayJobId=20 ArrayTaskId={tasks} JobState=PENDING Reason=Resources NodeList=(null)",
        "JobId=21 ArrayJobId=20 ArrayTaskId=9 JobState=RUNNING Reason=None NodeList=n1",
        "",
    )
    states = job_states("20")
    assert {number for number, state in states.items() if state.state == "PENDING"} == {f"20_{n}" for n in waiting}
    assert states["20_9"].nodes == "n1"
    assert len(states) == len(waiting) + 1


def test_slurm_is_asked_for_the_whole_list_of_tasks(slurm: FakeSlurm) -> None:
    """It cuts one of more than 64 characters short otherwise."""
    slurm.job(20, "JobState=PENDING Reason=Resources")
    job_states("20")
    assert slurm.environment("scontrol")["SLURM_BITSTR_LEN"] == "0"


def test_a_job_that_slurm_has_forgotten_is_looked_up_in_the_accounts(slurm: FakeSlurm) -> None:
    assert job_states("20") == {}
    slurm.install("sacct")
    slurm.answer("sacct", "20_0|COMPLETED|0:0|n1\n20_1|CANCELLED by 1000|0:15|None assigned\n20_2|FAILED|3:0|n[1-2]\n")
    assert job_states("20") == {
        "20_0": JobState("COMPLETED", "", "n1"),
        "20_1": JobState("CANCELLED", "", ""),
        "20_2": JobState("FAILED", "exit code 3", "n[1-2]"),
    }
    slurm.refuse("sacct", "sacct: error: Slurm accounting storage is disabled")
    assert job_states("20") == {}


def test_a_controller_that_does_not_answer_is_no_forgotten_job(slurm: FakeSlurm) -> None:
    slurm.refuse("scontrol", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(ClusterAwayError, match=r"^scontrol refused: .*Unable to contact slurm controller"):
        job_states("101")


def test_a_refused_cancellation_is_shown(slurm: FakeSlurm) -> None:
    cancel_job("101")
    assert slurm.calls("scancel") == [["101"]]
    slurm.refuse("scancel", "scancel: error: Access/permission denied")
    with pytest.raises(SubmitError, match=r"^scancel refused: scancel: error: Access/permission denied$"):
        cancel_job("101")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("None", ""),
        ("", ""),
        ("Resources", "waits for nodes to become free"),
        ("Priority", "jobs with a higher priority wait for the same nodes"),
        ("ReqNodeNotAvail,_UnavailableNodes:n[1-3]", "nodes that it needs are down, drained or reserved"),
        ("QOSMaxGRESPerUser", "a limit of the quality of service (QOSMaxGRESPerUser)"),
        ("QOSMaxJobsPerUserLimit", "you have reached your limit of running jobs"),
        ("AssocGrpCpuLimit", "a limit of your account (AssocGrpCpuLimit)"),
        ("MaxGRESPerAccount", "a limit of your account (MaxGRESPerAccount)"),
        ("SomethingNew(5)", "SomethingNew(5)"),
    ],
)
def test_the_reason_that_a_job_waits_is_in_words(reason: str, words: str) -> None:
    assert describe_reason(reason) == words
