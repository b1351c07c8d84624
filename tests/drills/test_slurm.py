"""Jobs on a real Slurm cluster: they give the local run's numbers, on several hosts, after every fault.

All of them in directories with a space and a quote in their names, on hosts whose own names are 127.0.1.1.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.drills import slurm as drills
from tests.drills.nodes import Command
from tests.drills.nodes import untouched as untouched_run
from tests.drills.slurm import DRILLS, TWO
from tests.drills.slurm_cluster import PROGRAM, Slurm, SlurmJob, a_cluster
from tests.support.runs import RunView, compare

pytestmark = pytest.mark.slurm
Untouched = Callable[[tuple[str, ...]], Command]
NOBODY = 65534
SHORT = ("train.max_steps=6", "cluster.workers=2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if not PROGRAM.exists():
        pytest.skip("../shared/slurm (a Slurm cluster on one machine) is not here; it is not part of the repository")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one machine needs root")
    with a_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    """Runs the job with some settings on this machine, without Slurm, once."""
    return cache(lambda settings: untouched_run(tmp_path_factory.mktemp("whole") / "run", *settings))


@pytest.mark.long
def test_two_jobs_on_the_same_hosts_train_to_the_local_loss_one_of_them_not_roots(
    slurm: Slurm, untouched: Untouched
) -> None:
    two = SlurmJob(slurm, "two", drills.TWO, user=NOBODY)
    three = SlurmJob(slurm, "three", drills.THREE)
    two.submit()
    # The other way to find the network: by the name of its interface.
    three.submit("--set", "cluster.slurm.interface=eth0", "--gpus-per-node=1", nodes=3)
    assert (two.wait_ended(), three.wait_ended()) == ("COMPLETED", "COMPLETED"), two.said() + three.said()
    assert sorted(two.hosts()[0]) == ["node1", "node2"]
    assert sorted(three.hosts()[0]) == ["node1", "node2", "node3"]
    for job, settings in ((two, drills.TWO), (three, drills.UNTOUCHED_THREE)):
        found = compare(job, untouched(settings))
        assert found.loss_deviation < 1e-5
        assert found.same_blocks
        assert found.same_weights
    # In peace: none of them found the other's ports or files.
    assert (two.requeues(), three.requeues()) == (0, 0)
    # What Slurm granted, and not what the host has.
    assert "with 1 CPUs, 0 GPUs, 1639 MiB and 409 MiB of object store" in two.said()
    assert "with 1 CPUs, 1 GPUs" in three.said()
    assert (two.run.root / "job.yaml").stat().st_uid == NOBODY
    slurm.wait_clean()


@pytest.mark.long
@pytest.mark.parametrize("name", DRILLS)
def test_after_a_fault_the_weights_are_those_of_the_run_that_nobody_touched(
    name: str, slurm: Slurm, untouched: Untouched
) -> None:
    drill = DRILLS[name]
    seen = drill.play(slurm)
    found = compare(seen.job, untouched(tuple(drill.settings)))
    assert found.same_blocks
    if drill.settings == drills.UNTOUCHED_ELASTIC:
        assert found.loss_deviation < 1e-5
        assert [workers for _, workers in seen.job.starts()] == [2, 1]
    else:
        assert found.same_weights
    assert drill.requeues in (None, seen.job.requeues())
    if drill.told:
        assert seen.steps_lost == 0
    if not drill.leaves_files:
        slurm.wait_clean()


@pytest.mark.long
def test_what_is_cancelled_leaves_nothing_and_goes_on_when_it_is_submitted_again(slurm: Slurm) -> None:
    job = SlurmJob(slurm, "cancelled", (*TWO, "train.max_steps=5000"))
    job.submit()
    job.wait_for_step(60)
    again = job.clm_dist("submit", "slurm", "tiny.yaml", "--store=store", check=False)
    assert again.returncode == 2
    assert "queued or running already" in again.stderr
    job.clm_dist("cancel")
    assert job.wait_ended() == "CANCELLED"
    slurm.wait_clean()
    assert job.requeues() == 0
    assert "has ended already" in job.clm_dist("cancel").stdout
    job.submit("--set", "train.max_steps=300", "--resume")
    assert job.wait_ended() == "COMPLETED", job.said()
    assert "Resuming from the checkpoint of step" in job.said()


@pytest.mark.slow
def test_a_job_that_fails_by_its_own_fault_is_not_requeued(slurm: Slurm) -> None:
    wrong = SlurmJob(slurm, "wrong", SHORT)
    (wrong.directory / "corpus.jsonl").write_text('{"topic": "t", "text": "too little"}\n')
    diverging = SlurmJob(slurm, "diverging", (*SHORT, "train.learning_rate=1e30", "train.max_grad_norm=null"))
    for job in (wrong, diverging):
        job.submit()
    for job, code in ((wrong, "2:0"), (diverging, "1:0")):
        assert job.wait_ended() == "FAILED", job.said()
        assert (job.requeues(), job.state()["ExitCode"]) == (0, code)
    assert "not finite" in diverging.said()
    assert "exit code 2" in wrong.clm_dist("status").stdout
    slurm.wait_clean()


@pytest.mark.long
def test_a_sweep_is_an_array_whose_text_is_prepared_first_and_whose_runs_are_requeued_alone(slurm: Slurm) -> None:
    job = SlurmJob(slurm, "sweep", (*TWO, "train.max_steps=200"))
    job.submit("--prepare-first", "--set", "cluster.slurm.prepare.cpus=2", "--array", "learning_rate=1e-3,2e-3")
    names = ["tiny-learning_rate-1e-3", "tiny-learning_rate-2e-3"]
    submission = read_json(job.directory / "runs/.submitted/tiny/submission.json")
    assert submission["run_names"] == names
    # Slurm says why at its next look; the text is prepared for some seconds.
    job.wait_until(lambda: "waits for another job, such as the one that prepares" in job.clm_dist("status").stdout)
    last = RunView(RunDir(job.directory / "runs" / names[1]))
    job.wait_until(lambda: last.last_step() >= drills.BEGIN)
    step = last.last_step()
    # The number of an array's last task is that of the array.
    slurm.ask("scancel", "--signal=USR1", "--batch", f"{job.job_id}_1")
    job.wait_ended()
    assert {state["ArrayTaskId"]: state["Restarts"] for state in job.states()} == {"0": "0", "1": "1"}
    (_, (resumed, _)) = last.starts()
    assert resumed >= step
    results = [read_json(job.directory / "runs" / name / "result.json") for name in names]
    assert [result["status"] for result in results] == ["done", "done"]
    assert results[0]["final"]["loss"] != results[1]["final"]["loss"]
    said = job.clm_dist("status").stdout
    assert "clm-dist report" in said
    assert "Tokenising" in (job.directory / "runs/.submitted/tiny/log").read_text()
    for task in (0, 1):
        log = (job.directory / f"runs/.submitted/tiny/{task}/log").read_text()
        assert "Tokenising" not in log
    compared = job.clm_dist("report", *(f"runs/{name}" for name in names)).stdout
    assert all(f"{result['final']['perplexity']:.2f}" in compared for result in results)


@pytest.mark.long
def test_hosts_whose_names_do_not_resolve_find_each_other(slurm: Slurm) -> None:
    own = {node: slurm.call("exec", node, "cat", "/etc/hosts") for node in slurm.nodes}

    def write_hosts(node: str, text: str) -> None:
        slurm.call("exec", node, "sh", "-c", 'printf %s "$1" >/etc/hosts', "sh", text)

    try:
        for node in slurm.nodes:
            write_hosts(node, f"127.0.0.1 localhost\n127.0.1.1 {node}\n")
        job = SlurmJob(slurm, "no names", SHORT)
        job.submit()
        assert job.wait_ended() == "COMPLETED", job.said()
        assert sorted(job.hosts()[0]) == ["node1", "node2"]
    finally:
        for node, text in own.items():
            write_hosts(node, text)
    slurm.wait_clean()
