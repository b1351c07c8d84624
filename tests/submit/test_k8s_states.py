"""How a job on Kubernetes is, in words."""

from typing import Any

import pytest

from clm_dist.submit.k8s.states import Found, has_ended, job_state
from clm_dist.submit.states import JobState

Object = dict[str, Any]
CREATED = "2026-01-01T10:00:00Z"


def ray_job(status: Object | None = None, *, suspend: bool = False, **metadata: Any) -> Object:
    given = {"name": "tiny", "uid": "u1", "creationTimestamp": CREATED, **metadata}
    return {"kind": "RayJob", "metadata": given, "spec": {"suspend": suspend}, "status": status or {}}


def plain_job(*conditions: Object, failed: int = 0, **spec: Any) -> Object:
    status = {"conditions": list(conditions), "failed": failed}
    metadata = {"name": "tiny", "uid": "u1", "creationTimestamp": CREATED}
    return {"kind": "Job", "metadata": metadata, "spec": spec, "status": status}


def true(kind: str, reason: str = "", message: str = "") -> Object:
    return {"type": kind, "status": "True", "reason": reason, "message": message}


def pod(
    name: str, role: str = "worker", *, node: str | None = None, labels: Object | None = None, **status: Any
) -> Object:
    given = {"app.kubernetes.io/component": role, **(labels or {})}
    metadata = {"name": name, "labels": given, "creationTimestamp": CREATED}
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": {"phase": "Pending", **status}}


def waiting(reason: str, message: str = "") -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod("tiny-w", containerStatuses=[{"name": "ray", "image": "registry/x:1", "state": state}])


def event(about: str, reason: str, message: str, when: str = "2026-01-01T10:05:00Z", kind: str = "Warning") -> Object:
    given = {"type": kind, "reason": reason, "message": message, "lastTimestamp": when}
    return {"involvedObject": {"name": about}, **given}


STARTING = ray_job({"jobDeploymentStatus": "Initializing", "jobId": "tiny-x", "rayClusterName": "tiny-abc"})


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ({}, "PENDING", "the KubeRay operator has not started it yet; is the operator running?"),
        ({"jobDeploymentStatus": "Initializing", "jobId": "x"}, "PENDING", "its pods are starting"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING", "jobId": "x"}, "PENDING", "its pods are starting"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": "x"}, "RUNNING", ""),
        (
            {"jobDeploymentStatus": "Retrying", "message": "head lost"},
            "RETRYING",
            "the last attempt failed, and another begins: head lost",
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "DONE", ""),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
            "FAILED",
            "the driver ended with exit code 2, so it is not tried again; `clm-dist logs tiny` shows the cause",
        ),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit code 1"},
            "FAILED",
            "the driver failed: exit code 1",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"},
            "FAILED",
            "not all pods were there in time (cluster.k8s.start_deadline_s); ask for less, or for a queue (--queue)",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "Unheard", "message": "of"}, "FAILED", "Unheard: of"),
        (
            {"jobDeploymentStatus": "ValidationFailed", "message": "no"},
            "FAILED",
            "the operator does not accept the RayJob: no",
        ),
    ],
)
def test_a_ray_job_is_told_by_its_status(status: Object, state: str, reason: str) -> None:
    job = ray_job(status | {"failed": 2})
    assert job_state(Found(job)) == JobState(state, reason, "", 2)
    assert has_ended(job) == (state in ("DONE", "FAILED"))


def test_a_ray_job_runs_where_its_driver_does_though_nobody_has_asked_ray_yet() -> None:
    job = ray_job({"jobDeploymentStatus": "Running", "jobStatus": "", "jobId": "x"})
    assert job_state(Found(job, [pod("tiny-d", "driver")])).state == "PENDING"
    assert job_state(Found(job, [pod("tiny-d", "driver", phase="Running")])).state == "RUNNING"


@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        (plain_job(), "PENDING", "its pods are starting"),
        (plain_job(true("Complete")), "DONE", ""),
        (plain_job(true("SuccessCriteriaMet")), "ENDING", "its pods are being ended"),
        (plain_job(true("FailureTarget")), "ENDING", "its pods are being ended"),
        (
            plain_job(true("Failed", "BackoffLimitExceeded", "Job has reached it")),
            "FAILED",
            "its pods failed more often than cluster.k8s.max_retries allows: Job has reached it",
        ),
        (plain_job(suspend=True), "SUSPENDED", "it is suspended (spec.suspend)"),
    ],
)
def test_a_plain_job_is_told_by_its_conditions(job: Object, state: str, reason: str) -> None:
    assert job_state(Found(job)) == JobState(state, reason, "", 0)


def test_a_plain_job_whose_file_is_wrong_is_told_as_such() -> None:
    message = "Container ray for pod default/tiny-0-x failed with exit code 2 matching FailJob rule at index 0"
    state = job_state(Found(plain_job(true("Failed", "PodFailurePolicy", message), failed=1)))
    assert (state.state, state.reason[:51]) == ("FAILED", "the driver ended with exit code 2, so it is not tri")


def test_a_plain_job_runs_where_its_first_pod_does() -> None:
    index = "batch.kubernetes.io/job-completion-index"
    pods = [pod("tiny-0-x", labels={index: "0"}, node="n2", phase="Running"), pod("tiny-1-x", node="n1")]
    assert job_state(Found(plain_job(), pods)) == JobState("RUNNING", "", "n1,n2", 0)


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([waiting("ErrImagePull", "not found")], "the image registry/x:1 cannot be pulled: not found"),
        ([waiting("ImagePullBackOff")], "the image registry/x:1 cannot be pulled: ImagePullBackOff"),
        ([waiting("InvalidImageName", "bad")], "registry/x:1 is not a name of an image: bad"),
        (
            [waiting("CreateContainerConfigError", 'secret "hub" not found')],
            'the pod tiny-w lacks a Secret or a ConfigMap, or a key of one: secret "hub" not found',
        ),
        ([waiting("ContainerCreating")], "its pods are starting"),
        (
            [pod("w", conditions=[{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3 nodes"}])],
            "the pod w finds no node: 0/3 nodes",
        ),
        (
            [
                pod(
                    "w",
                    conditions=[
                        {
                            "type": "PodScheduled",
                            "reason": "Unschedulable",
                            "message": "pod has unbound immediate PersistentVolumeClaims",
                        }
                    ],
                )
            ],
            "the pod w waits for its claim: pod has unbound immediate PersistentVolumeClaims",
        ),
        (
            [
                pod(
                    "h",
                    "head",
                    containerStatuses=[{"name": "ray", "lastState": {"terminated": {"reason": "OOMKilled"}}}],
                )
            ],
            "the pod h took more memory than its limit (OOMKilled); raise cluster.k8s.head.memory",
        ),
        ([pod("w", phase="Failed", reason="Evicted", message="disk")], "the pod w: Evicted: disk"),
    ],
)
def test_what_keeps_pods_from_running_is_the_reason(pods: list[Object], reason: str) -> None:
    assert job_state(Found(STARTING, pods)).reason == reason


def test_pods_that_are_being_deleted_are_no_reason() -> None:
    going = waiting("ErrImagePull")
    going["metadata"]["deletionTimestamp"] = CREATED
    assert job_state(Found(STARTING, [going])).reason == "its pods are starting"


def test_a_job_that_failed_says_which_pod_took_too_much_memory() -> None:
    ended = {"name": "ray", "state": {"terminated": {"reason": "OOMKilled"}}}
    job = ray_job({"jobDeploymentStatus": "Failed", "reason": "AppFailed"})
    assert job_state(Found(job, [pod("w", containerStatuses=[ended])])).reason == (
        "the driver failed; the pod w took more memory than its limit (OOMKilled); raise cluster.k8s.memory_per_pod"
    )


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (
            [event("tiny-abc", "FailedCreate", "exceeded quota: team")],
            "a quota of the namespace does not let its pods be made: exceeded quota: team",
        ),
        ([event("tiny", "FailedToCreateHeadPod", "no")], "its pods cannot be made: no"),
        ([event("tiny-w", "FailedMount", "timed out")], "a volume of the pod tiny-w cannot be mounted: timed out"),
        (
            [event("tiny", "FailedX", "old", "2026-01-01T10:01:00Z"), event("tiny", "FailedX", "new")],
            "its pods cannot be made: new",
        ),
        ([event("tiny-2", "FailedCreate", "of another run")], "its pods are starting"),
        ([event("tiny", "FailedCreate", "of an earlier one", "2026-01-01T09:00:00Z")], "its pods are starting"),
        ([event("tiny", "FailedCreate", "x", kind="Normal")], "its pods are starting"),
    ],
)
def test_events_of_its_own_objects_are_the_reason(events: list[Object], reason: str) -> None:
    assert job_state(Found(STARTING, [pod("tiny-w")], events)).reason == reason


def test_a_suspended_job_says_what_its_queue_says() -> None:
    job = ray_job({"jobDeploymentStatus": "Suspended"}, suspend=True, labels={"kueue.x-k8s.io/queue-name": "q"})
    assert job_state(Found(job)) == JobState("SUSPENDED", "it waits for the queue q to admit it", "", 0)
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient quota for gpu"}
    others, own = (
        {"metadata": {"ownerReferences": [{"uid": uid}]}, "status": {"conditions": [condition]}} for uid in ("u2", "u1")
    )
    assert job_state(Found(job, workloads=[others])).reason == "it waits for the queue q to admit it"
    reason = job_state(Found(job, workloads=[others, own])).reason
    assert reason == "the queue q has not admitted it: insufficient quota for gpu"


def test_what_is_deleted_is_told() -> None:
    assert job_state(Found(ray_job(deletionTimestamp=CREATED))).state == "ENDING"
    assert job_state(Found(None)).state == "DELETED"
    assert not job_state(Found(None)).active
