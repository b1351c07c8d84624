"""What `submit k8s` waits for, and what it removes where a submission fails."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from clm_dist.errors import SubmitError
from clm_dist.submit.k8s import made
from clm_dist.submit.k8s.kubectl import Kubectl
from clm_dist.submit.submission import submitted_dir
from tests.support.clusters import RAY_JOB, Kubernetes, KubernetesCommands
from tests.support.disks import mode

pytestmark = pytest.mark.slow


def test_pods_that_still_save_are_waited_for(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    k8s_commands.submit()
    kubernetes.add_pod("tiny-head", "head")
    k8s_commands.call("cancel")
    sleeps: list[float] = []

    def work(seconds: float) -> None:
        sleeps.append(seconds)
        assert kubernetes.names() == {"pods/tiny-head"}, "it was not waited for"
        if len(sleeps) == 3:
            kubernetes.set(("v1", "pods"), "tiny-head", phase="Failed")

    monkeypatch.setattr(made, "time", SimpleNamespace(sleep=work, time=time.time, monotonic=lambda: 0.0))
    said = k8s_commands.submit()
    assert said.code == 0, said.err
    assert "pods of the last submission may still save, and submit waits for their end: tiny-head" in said.err
    assert len(sleeps) == 3
    # Not for ever, though.
    k8s_commands.call("cancel")
    kubernetes.add_pod("tiny-stuck", "worker")
    clock = iter(range(0, 10_000, 100))
    quick = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=lambda: next(clock))
    monkeypatch.setattr(made, "time", quick)
    said = k8s_commands.submit()
    assert said.code == 2
    assert "kubectl describe pod tiny-stuck --namespace=default" in said.err.replace("\n", " ")
    assert "rayjobs/tiny" not in kubernetes.names()


def test_nobody_else_may_read_what_is_remembered(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    assert k8s_commands.submit().code == 0
    files = submitted_dir(k8s_commands.runs, "tiny")
    assert {path.name: mode(path) for path in files.iterdir()} == {"job.yaml": 0o600, "submission.json": 0o600}
    assert mode(files) == 0o700


def test_a_job_that_is_being_deleted_is_waited_for(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    k8s_commands.submit()
    finalized = {"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}}
    kubernetes.store.update(*RAY_JOB, "default", "tiny", lambda job: kubernetes.miniapi.merge(job, finalized))
    k8s_commands.call("cancel")
    assert kubernetes.get(RAY_JOB)["metadata"]["deletionTimestamp"]

    def let_go(_: float) -> None:
        kubernetes.store.objs.pop((*RAY_JOB, "default", "tiny"), None)

    monkeypatch.setattr(made, "time", SimpleNamespace(sleep=let_go, time=time.time, monotonic=lambda: 0.0))
    said = k8s_commands.submit()
    assert said.code == 0, said.err
    assert "deletionTimestamp" not in kubernetes.get(RAY_JOB)["metadata"]


def test_what_was_made_is_removed_where_the_rest_is_refused(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Kubectl.apply

    def spoilt(kubectl: Kubectl, objects: Any, *, dry_run: bool = False) -> None:
        if not dry_run:
            objects[-1]["spec"]["entrypont"] = "x"
        apply(kubectl, objects, dry_run=dry_run)

    monkeypatch.setattr(Kubectl, "apply", spoilt)
    said = k8s_commands.submit()
    assert (said.code, "entrypont" in said.err) == (2, True)
    assert ("create", "ConfigMap", "default", "tiny") in kubernetes.store.history
    assert kubernetes.names() == set()
    assert k8s_commands.call("logs").err.startswith("error: nothing was submitted")


def test_what_can_not_be_removed_is_named(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(kubectl: Kubectl, *_: Any, dry_run: bool = False) -> None:
        if not dry_run:
            raise SubmitError("kubectl: connection lost")

    monkeypatch.setattr(Kubectl, "apply", lost)
    monkeypatch.setattr(Kubectl, "delete", lost)
    said = k8s_commands.submit()
    names = "rayjob.ray.io/tiny, configmap/tiny, networkpolicy.networking.k8s.io/tiny"
    assert (said.code, said.err.splitlines()[-2:]) == (
        2,
        [
            "error: kubectl: connection lost",
            f"what was made may still be there ({names}): kubectl: connection lost",
        ],
    )
