"""Jobs in pods that really run: they give the local run's numbers, whatever happens to the pods."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.k8s.sync import pack
from tests.conftest import ROOT, tiny_job, write_corpus
from tests.drills.k8s import DRILLS
from tests.drills.k8s_pods import IMAGE, SETTINGS, SHARED, PodJob, a_directory, image, podrun
from tests.drills.nodes import Command, untouched
from tests.drills.slurm import BEGIN, TWO
from tests.support.runs import RunView, compare

pytestmark = [pytest.mark.k8s, pytest.mark.long]
SHORT = ("train.max_steps=6", "cluster.workers=2", "cluster.k8s.max_retries=0")


@pytest.fixture
def directory() -> Iterator[Path]:
    if not SHARED.exists():
        pytest.skip("../shared/k8s (pods as namespaces of this machine) is not here; it is not part of the repository")
    if os.geteuid() != 0:
        pytest.skip("pods as namespaces of this machine need root")
    if not all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv", "curl"))):
        pytest.skip("pods as namespaces of this machine need iproute2, util-linux and curl")
    with a_directory() as one:
        yield one


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Command]:
    """Runs the job without pods, once."""
    return cache(lambda: untouched(tmp_path_factory.mktemp("local") / "run", *TWO))


@pytest.mark.parametrize("name", DRILLS)
def test_whatever_happens_to_pods_the_weights_are_those_of_the_run_that_nobody_touched(
    name: str, directory: Path, local: Callable[[], Command]
) -> None:
    drill = DRILLS[name]
    job, seen = drill.run(directory)
    found = compare(job, local())
    assert found.same_blocks
    assert found.same_weights
    assert found.loss_deviation < 1e-5
    for hosts in job.hosts():
        assert len(set(hosts)) == 2, hosts
    if drill.told:
        assert seen is not None
        assert seen.steps_lost == 0


def test_a_fault_of_the_job_file_is_not_tried_again(directory: Path) -> None:
    with PodJob(directory, [*SHORT, "tokenizer={path: /shared/absent, train: null}"]) as job:
        (attempt,) = job.wait_ended()["attempts"]
    # The operator takes what was stopped for complete, and does not try it again.
    assert attempt["jobStatus"] == "STOPPED", job.said()
    assert "the driver has ended with 2" in job.said()


def test_kubectl_submits_shows_and_cancels_pods_that_run(directory: Path, local: Callable[[], Command]) -> None:
    claim = directory / "claim"
    claim.mkdir()
    claim.chmod(0o777)
    job_file = directory / "tiny.yaml"
    job_file.write_text(yaml.safe_dump(tiny_job(write_corpus(claim))))
    cluster = podrun("minicluster").Cluster(
        str(directory / "pods"), str(SHARED / "crds"), {IMAGE: image()}, {"clm-dist": str(claim)}, time_scale=0.1
    )
    environment = {**os.environ, "KUBECONFIG": cluster.server.kubeconfig(str(directory / "config")), "COLUMNS": "200"}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "clm_dist", *arguments, "--runs", str(directory / "record")]
        ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    settings = [f"--set={setting}" for setting in (*SETTINGS, *TWO, "data.path=/shared/corpus.jsonl")]
    run = RunView(RunDir(claim / "runs" / "tiny"))

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, call("status") + call("logs")
            time.sleep(0.5)

    try:
        cluster.store.create("v1", "persistentvolumeclaims", "default", {"metadata": {"name": "clm-dist"}})
        call("submit", "k8s", "tiny.yaml", "--plain", *settings)
        wait_until(lambda: run.last_step() >= BEGIN)
        assert "running" in call("status")
        assert "[driver]" in call("logs")
        assert "deleted job/tiny" in call("cancel")
        wait_until(lambda: all(pod.phase in ("Failed", "Succeeded") for pod in cluster.node.pods.values()))
        assert "deleted" in call("status")
        call("submit", "k8s", "tiny.yaml", "--plain", *settings)
        wait_until(lambda: "done" in call("status"))
        assert "Resuming from the checkpoint of step" in call("logs")
    finally:
        cluster.close()
    # Whoever cancels a run has it save.
    (_, first), (step, _) = run.starts()
    assert first == 2
    assert step >= BEGIN
    assert compare(run, local()).same_weights


def test_the_code_of_a_working_tree_goes_before_the_images(directory: Path) -> None:
    code = pack(ROOT)
    with PodJob(directory, SHORT, code=code) as job:
        assert job.wait_ended()["jobDeploymentStatus"] == "Complete", job.said()
    assert read_json(job.run.result)["versions"]["commit"] == code.commit


def test_an_image_that_is_not_there_loses_nothing(directory: Path) -> None:
    settings = [*SHORT, "cluster.k8s.image=clm-dist:absent", "cluster.k8s.start_deadline_s=20"]
    with PodJob(directory, settings) as job:
        status = job.wait_ended()
    assert (status["jobDeploymentStatus"], status["reason"]) == ("Failed", "PreRunningDeadlineExceeded")
    assert not job.run.exists()
    with PodJob(directory, SHORT) as job:
        assert job.wait_ended()["jobDeploymentStatus"] == "Complete", job.said()
    assert job.last_step() == 6
