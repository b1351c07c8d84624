"""What a cluster lacks for a job, and what is in the way of one, is said before anything is made."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.k8s import amount
from clm_dist.submit.k8s import kubectl as commands_module
from clm_dist.submit.k8s import render as k8s
from clm_dist.submit.k8s.checks import asked_of, lacking_of
from clm_dist.submit.k8s.kubectl import ForbiddenError, Kubectl
from tests.support.clusters import JOB, RAY_JOB, Kubernetes, KubernetesCommands

pytestmark = pytest.mark.slow

QUEUES = ("kueue.x-k8s.io/v1beta1", "localqueues")


def refused(said: Any, kubernetes: Kubernetes, *messages: str, code: int = 2) -> None:
    """A submission was refused with these words, and has made nothing."""
    assert said.code == code, said.err
    for message in messages:
        assert message in said.err
    assert not [name for _, kind, _, name in kubernetes.store.history if name.startswith("tiny")]


def test_without_kubectl_nothing_is_written(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = k8s_commands.submit()
    refused(said, kubernetes, "error: kubectl is not on the PATH")
    assert not k8s_commands.runs.exists()


def test_a_cluster_that_does_not_answer_is_told_with_all_that_kubectl_says(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    kubernetes.config.write_text(kubernetes.config.read_text().replace(kubernetes.server.url, "http://127.0.0.1:1"))
    said = k8s_commands.submit()
    refused(said, kubernetes, "error: no cluster answers: kubectl: ", "127.0.0.1:1 was refused", code=75)
    assert "`kubectl config get-contexts` lists those that kubectl knows" in said.err


def test_a_namespace_that_is_not_there(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    said = k8s_commands.submit("--namespace", "team-b")
    refused(
        said, kubernetes, "--set", "the namespace team-b does not exist; name another with --namespace, or make it with"
    )


def test_a_cluster_without_the_operator_is_offered_a_plain_job(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    kubernetes.lose("rayjobs", "rayclusters")
    refused(k8s_commands.submit(), kubernetes, "the KubeRay operator is not installed", "submit with --plain")
    assert k8s_commands.submit("--plain").code == 0


def test_a_plain_job_needs_a_server_of_1_31(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    kubernetes.store.k8s = "1.30.0"
    refused(k8s_commands.submit("--plain"), kubernetes, "the cluster has Kubernetes 1.30, and --plain needs 1.31")


def test_a_claim_that_is_missing_comes_with_the_command_that_makes_one(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    said = k8s_commands.submit("--claim", "runs")
    refused(
        said, kubernetes, "the PersistentVolumeClaim runs does not exist in default; name another with --claim", "<<END"
    )
    assert "metadata: {name: runs}\n" in said.err


def test_secrets_are_there_with_a_token_where_the_model_is_pushed(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    options = ("--secret", "hub", "--set", "hub.push=end")
    refused(
        k8s_commands.submit(*options), kubernetes, "the Secret hub does not exist in default; make it with `kubectl"
    )
    kubernetes.create("v1", "secrets", "hub", data={"TOKEN": base64.b64encode(b"hf_secret").decode()})
    said = k8s_commands.submit(*options)
    refused(said, kubernetes, "the Secret hub has no key HF_TOKEN, and hub.push is end")
    assert "hf_secret" not in said.err
    assert k8s_commands.submit("--secret", "hub").code == 0
    pull = ("--set", "name=other", "--set", "cluster.k8s.pull_secret=registry")
    assert "the Secret registry does not exist in default" in k8s_commands.submit(*pull).err


def test_a_queue_that_is_not_there_is_told_with_those_that_are(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    refused(
        k8s_commands.submit("--queue", "gpus"), kubernetes, "the queue gpus does not exist in default; there is none"
    )
    for name in ("team-b", "team-a"):
        kubernetes.create(*QUEUES, name, spec={"clusterQueue": "all"})
    refused(
        k8s_commands.submit("--queue", "gpus"),
        kubernetes,
        "the queue gpus does not exist in default; there are team-a, ",
    )
    assert k8s_commands.submit("--queue", "team-a").code == 0
    made = kubernetes.get(RAY_JOB)
    assert (made["spec"]["suspend"], made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == (True, "team-a")
    kubernetes.lose("localqueues", "workloads")
    said = k8s_commands.submit("--queue", "team-a", "--set", "name=other")
    assert "the cluster does not have Kueue, which starts the jobs of the queue team-a" in said.err


def test_a_quota_that_is_too_small_is_told_line_by_line(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    hard = {"requests.cpu": "20", "limits.memory": "50Gi", "requests.nvidia.com/gpu": "8", "pods": "4", "secrets": "1"}
    used = {"requests.cpu": "1500m", "requests.nvidia.com/gpu": "5", "pods": "0", "limits.memory": "0"}
    kubernetes.create("v1", "resourcequotas", "team", spec={"hard": hard}, status={"hard": hard, "used": used})
    said = k8s_commands.submit("--pods", 2, "--gpus-per-pod", 2, "--set", "cluster.k8s.memory_per_pod=32Gi")
    refused(said, kubernetes, "a quota of default is too small; wait for other jobs to end")
    assert said.err.splitlines()[1:] == [
        "of team: limits.memory is 50Gi, of which 0 are used, and the job asks for 72.5Gi",
        "of team: requests.nvidia.com/gpu is 8, of which 5 are used, and the job asks for 4",
    ]
    assert k8s_commands.submit("--pods", 1, "--gpus-per-pod", 2).code == 0


def test_a_quota_for_some_pods_only_is_left_out() -> None:
    quota = {"spec": {"scopes": ["BestEffort"]}, "status": {"hard": {"pods": "0"}}}
    assert list(lacking_of(quota, {"pods": 3})) == []
    assert list(lacking_of(quota | {"spec": {}}, {"pods": 3}))


@pytest.mark.parametrize(
    ("quantity", "value"), [("100m", 0.1), ("2", 2), ("1e3", 1000), ("1Ki", 1024), ("1E", 1e18), ("3Pi", 3 * 2**50)]
)
def test_quantities_are_read_as_kubernetes_writes_them(quantity: str, value: float) -> None:
    assert amount(quantity) == pytest.approx(value)


def test_all_pods_of_a_job_are_counted() -> None:
    template = {"spec": {"containers": [{"resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "1"}}}]}}
    job = {"kind": "Job", "spec": {"parallelism": 4, "template": template}}
    assert asked_of([{"kind": "ConfigMap"}, job]) == {"pods": 4, "requests.cpu": 2, "cpu": 2, "limits.cpu": 4}


def test_what_the_user_may_not_see_is_left_out(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, find = Kubectl.get, Kubectl.find

    def guarded_get(kubectl: Kubectl, kind: str, name: str) -> Any:
        if kind in ("namespace", "secret", "persistentvolumeclaim", "rayjob.ray.io"):
            raise ForbiddenError(f"kubectl: Error from server (Forbidden): {kind}")
        return get(kubectl, kind, name)

    def guarded_find(kubectl: Kubectl, kind: str, labels: dict[str, str] | None = None) -> Any:
        if kind != "pods":
            raise ForbiddenError(f"kubectl: Error from server (Forbidden): {kind}")
        return find(kubectl, kind, labels)

    monkeypatch.setattr(Kubectl, "get", guarded_get)
    monkeypatch.setattr(Kubectl, "find", guarded_find)
    said = k8s_commands.submit("--plain", "--secret", "hub", "--claim", "unseen", "--queue", "q")
    assert said.code == 0, said.err
    assert k8s_commands.call("status").code == 0
    # Its own Secret is deleted though it may not be read.
    assert k8s_commands.call("cancel").code == 0
    assert kubernetes.names() == set()


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_a_run_of_this_name_that_is_active_is_refused_from_any_machine(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, plain: tuple[str, ...], tmp_path: Path
) -> None:
    k8s_commands.submit()
    elsewhere = KubernetesCommands(k8s_commands.capsys, k8s_commands.monkeypatch, tmp_path / "other", k8s_commands.job)
    before = kubernetes.store.history[:]
    said = elsewhere.submit("--overwrite", *plain)
    assert said.code == 2
    assert "tiny is queued or running already, as rayjob/tiny in the namespace default, and was submitted " in said.err
    assert "end it with `kubectl delete rayjob tiny --namespace=default`" in said.err
    assert kubernetes.store.history == before


def test_a_job_that_has_ended_gives_way(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    k8s_commands.submit("--plain")
    old = kubernetes.get(JOB)["metadata"]["uid"]
    kubernetes.set(JOB, conditions=[{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}])
    # A Job's template cannot be changed, so the new one is checked under another name.
    said = k8s_commands.submit("--plain", "--image", "registry.example/clm-dist:2")
    assert said.code == 0, said.err
    new = kubernetes.get(JOB)
    assert new["metadata"]["uid"] != old
    assert new["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/clm-dist:2"


def test_a_claim_of_one_node_is_warned_of(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    kubernetes.create("v1", "persistentvolumeclaims", "one", spec=spec)
    said = k8s_commands.submit("--claim", "one")
    assert (said.code, "the claim one is ReadWriteOnce" in said.err) == (0, True)


def test_an_operator_that_lacks_fields_is_told(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_objects(monkeypatch, lambda made: made[-1]["spec"].update(newerField=1))
    said = k8s_commands.submit()
    assert (said.code, "older than 1.6" in said.err, "newerField" in said.err) == (2, True, True)


@pytest.mark.parametrize(("version", "plural"), [("v1", "configmaps"), JOB])
def test_what_somebody_else_has_made_stays(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, version: str, plural: str
) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}
    kubernetes.create(version, plural, "tiny", **({"spec": {"template": template}} if plural == "jobs" else {}))
    before = kubernetes.store.history[:]
    said = k8s_commands.submit()
    assert (said.code, "tiny in default that clm-dist did not make, and does not change" in said.err) == (2, True)
    assert kubernetes.store.history == before


def change_objects(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    objects = k8s.objects

    def changed(*arguments: Any) -> Any:
        made = objects(*arguments)
        change(made)
        return made

    monkeypatch.setattr(k8s, "objects", changed)


def test_the_server_s_refusal_is_shown_whole(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_objects(monkeypatch, lambda made: made[-1]["spec"].update(entrypont="[x]"))
    said = k8s_commands.submit()
    refused(said, kubernetes, "strict decoding error: unknown field", "entrypont")


def test_without_a_context_the_namespace_is_that_of_the_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not any((Path(place) / "kubectl").exists() for place in os.environ["PATH"].split(":")):
        pytest.skip("kubectl is not here")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert Kubectl.here(None) == Kubectl("default")
    (tmp_path / "namespace").write_text("notebooks")
    monkeypatch.setattr(commands_module, "_POD_NAMESPACE", tmp_path / "namespace")
    assert Kubectl.here(None) == Kubectl("notebooks")
    assert Kubectl.here("other") == Kubectl("other")
