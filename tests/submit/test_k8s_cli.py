"""`clm-dist submit k8s`: its options, what it warns of, and where it leaves what."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from clm_dist.config.load import job_text, load_job
from clm_dist.submit.submission import Place, Submission
from tests.support.clusters import RAY_JOB, Kubernetes, KubernetesCommands
from tests.support.command import cells
from tests.support.fakes import FakeSlurm

pytestmark = pytest.mark.slow


def test_a_dry_run_prints_what_is_applied_and_asks_nobody(
    k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CLM_DIST_STORE", "/a/path/of/this/machine")
    options = ("--pods", 3, "--gpus-per-pod", 4, "--claim", "c", "--secret", "s", "--namespace", "n", "--queue", "q")
    said = k8s_commands.submit("--dry-run", "--overwrite", "--resume", *options)
    assert (said.code, said.err) == (0, "")
    assert not k8s_commands.runs.exists()
    config, policy, job = yaml.safe_load_all(said.out)
    assert {one["metadata"]["namespace"] for one in (config, policy, job)} == {"n"}
    assert job["spec"]["entrypoint"] == "python -m clm_dist.submit.in_pod.driver --resume --overwrite"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    assert (group["replicas"], container["resources"]["limits"]["nvidia.com/gpu"]) == (3, "4")
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}]
    assert {"name": "CLM_DIST_STORE", "value": "/shared/store"} in container["env"]
    said = k8s_commands.submit("--dry-run", "--store", "s3://bucket/blocks", "--plain")
    assert "value: s3://bucket/blocks" in said.out
    assert said.out.startswith("# `submit` also makes the Secret tiny-ray with a random key.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "/data/store"), "--store /data/store is a directory of this machine, which pods do not see;"),
        (("--pods", 0), "cluster.k8s.pods is 0: input should be greater than 0"),
        (
            ("--workers", 4),
            "write --pods 4 for the number of pods, or --set cluster.workers=4 for the number of workers",
        ),
        (
            ("--gpus-per-worker", 2),
            "--gpus-per-worker does not exist any more, because a pod may have several workers;",
        ),
        (("--set", "name=Tiny"), "--set name=Tiny: the name Tiny is not a name that Kubernetes allows"),
        (("--set", "cluster.gpus_per_worker=1"), "say how many each pod has with --gpus-per-pod"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(
    k8s_commands: KubernetesCommands, options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    said = k8s_commands.submit(*options)
    assert (said.code, message in said.err) == (2, True), said.err


def number_of(kubernetes: Kubernetes) -> str:
    """The number of the submission that its pods have."""
    spec = kubernetes.get(RAY_JOB)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (number,) = (one["value"] for one in spec["containers"][0]["env"] if one["name"] == "CLM_DIST_SUBMISSION")
    return str(number)


def test_a_submission_is_found_again_with_its_place(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert k8s_commands.submit("--overwrite").code == 0
    one = Submission.read(k8s_commands.runs / ".submitted" / "tiny")
    assert (one.backend, one.job_id, one.k8s) == ("k8s", "rayjob/tiny", Place("default", "mini", False))
    assert load_job(one.files(0).job).config.cluster.k8s.image == "registry.example/clm-dist:1"
    first = number_of(kubernetes)
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Failed", reason="AppFailed")
    assert k8s_commands.submit("--overwrite").code == 0
    # By which pods know this submission from the one before it.
    assert number_of(kubernetes) != first
    # The context of kubectl may be another by now.
    text = kubernetes.config.read_text()
    kubernetes.config.write_text(text.replace("current-context: mini", "current-context: other"))
    assert cells(k8s_commands.call("status").out, "tiny")[2] == "pending"


def test_a_job_that_failed_says_where_to_look(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    k8s_commands.submit()
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Complete", jobStatus="STOPPED")
    said = k8s_commands.call("status")
    assert cells(said.out, "tiny")[2] == "failed"
    assert "tiny: the driver ended with exit code 2" in said.out
    assert said.out.endswith("why: clm-dist logs tiny -n 40\n")


def test_a_job_that_a_queue_holds_says_why_and_is_cancelled(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    kubernetes.create("kueue.x-k8s.io/v1beta1", "localqueues", "q", spec={"clusterQueue": "all"})
    assert k8s_commands.submit("--queue", "q").code == 0
    owner = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "name": "tiny",
        "uid": kubernetes.get(RAY_JOB)["metadata"]["uid"],
    }
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient quota"}
    workload = {"owners": [owner], "status": {"conditions": [condition]}}
    kubernetes.create("kueue.x-k8s.io/v1beta1", "workloads", "rayjob-tiny", **workload)
    said = k8s_commands.call("status")
    assert cells(said.out, "tiny")[2] == "suspended"
    assert "tiny: the queue q has not admitted it: insufficient quota\n" in said.out
    assert k8s_commands.call("cancel").out.startswith("deleted rayjob/tiny in the namespace default; ")
    assert "rayjobs/tiny" not in kubernetes.names()


def test_a_pod_that_is_pending_says_why_from_events_and_pods(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    k8s_commands.submit()
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Initializing", jobId="tiny-x", rayClusterName="tiny-abc")
    kubernetes.add_event("tiny-abc", "FailedToCreateWorkerPod", "pods is forbidden: exceeded quota: team")
    assert "tiny: a quota of the namespace does not let its pods be made: pods" in k8s_commands.call("status").out
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    kubernetes.add_pod("tiny-w1", phase="Pending", conditions=[condition])
    assert "tiny: the pod tiny-w1 finds no node: 0/3 nodes\n" in k8s_commands.call("status").out


def test_paths_that_pods_do_not_see_are_warned_of(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    k8s_commands.job.write_text(
        "name: tiny\ndata: {source: files, path: [texts/*.txt, /shared/a.txt, 's3://b/c']}\nmodel: {path: gpt2}\n"
    )
    settings = (f"tokenizer.path={tmp_path / 'model'}", "checkpoint.path=/scratch", "data.eval_path=texts/b.txt")
    said = k8s_commands.submit(*(word for setting in settings for word in ("--set", setting)))
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert [line.split(" is a path of this machine")[0] for line in warnings] == [
        "warning: no GPUs are asked for, so this trains on CPUs; --gpus-per-pod asks",
        f"warning: data.path {Path.cwd()}/texts/*.txt",
        f"warning: data.eval_path {Path.cwd()}/texts/b.txt",
        "warning: checkpoint.path /scratch",
        f"warning: tokenizer.path {tmp_path}/model",
    ]
    assert "pods see only the claim, at /shared; copy it there, or name a URL" in warnings[1]
    idle = k8s_commands.submit("--set", "name=other", "--gpus-per-pod", 4).err
    assert "warning: 3 of the GPUs stay idle: cluster.workers is 1" in idle


def test_a_name_that_is_active_in_another_place_is_refused(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    assert k8s_commands.submit().code == 0
    kubernetes.store.create("v1", "namespaces", None, {"metadata": {"name": "b"}})
    kubernetes.store.create("v1", "persistentvolumeclaims", "b", {"metadata": {"name": "clm-dist"}})
    said = k8s_commands.submit("--namespace", "b")
    assert said.code == 2
    assert "tiny is queued or running already, as rayjob/tiny in the namespace default; see it with" in said.err
    # A cluster that is gone holds nothing up.
    root = k8s_commands.runs / ".submitted" / "tiny"
    replace(Submission.read(root), k8s=Place("default", "gone")).write()
    assert k8s_commands.submit("--namespace", "b").code == 0


def test_a_slurm_job_of_a_name_that_is_active_on_kubernetes_is_refused(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, tmp_path: Path
) -> None:
    assert k8s_commands.submit().code == 0
    fake = FakeSlurm(tmp_path / "slurm")
    for directory in ("bin", "jobs"):
        (fake.root / directory).mkdir(parents=True)
    fake.install("sbatch", "sinfo")
    fake.answer("sinfo", "cpu*|(null)\n")
    k8s_commands.monkeypatch.setenv("PATH", str(fake.path), prepend=":")
    said = k8s_commands.call("submit", "slurm", k8s_commands.job, "--store", tmp_path / "store")
    assert (said.code, "tiny is queued or running already, as rayjob/tiny" in said.err) == (2, True), said.err


def test_what_is_remembered_is_the_resolved_job(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    k8s_commands.submit("--pods", 2)
    saved = load_job(k8s_commands.runs / ".submitted" / "tiny" / "job.yaml").config
    assert kubernetes.get(("v1", "configmaps"))["data"]["job.yaml"] == job_text(saved)
