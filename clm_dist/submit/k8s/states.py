"""The state of a job on Kubernetes, from its objects in the cluster. Asks no cluster.

The objects are the RayJob or the Indexed Job, the pods, the events of the namespace, and Kueue's workload of the job.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clm_dist.submit.k8s.request import Object
from clm_dist.submit.states import JobState

DRIVER = "app.kubernetes.io/component"
"""Label of pods: `driver`, `head`, `worker`."""
INDEX = "batch.kubernetes.io/job-completion-index"
"""Label of the pods of an Indexed Job; pod 0 has the driver."""

_MEND_FIRST = "the driver ended with exit code 2, so it is not tried again; `clm-dist logs {name}` shows the cause"
_RAY_REASONS = {
    "AppFailed": "the driver failed",
    "DeadlineExceeded": "it took longer than the RayJob may",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "Ray's job has ended, but the pod that submits it has not",
    "JobStatusCheckTimeoutExceeded": (
        "Ray's head did not come back within five minutes; submit the job again, and it continues from its last "
        "checkpoint"
    ),
    "PreRunningDeadlineExceeded": (
        "not all pods were there in time (cluster.k8s.start_deadline_s); ask for less, or for a queue (--queue)"
    ),
    "SubmissionFailed": "the pod that submits the driver to Ray failed",
    "ValidationFailed": "the operator does not accept the RayJob",
}
_JOB_REASONS = {
    "BackoffLimitExceeded": "its pods failed more often than cluster.k8s.max_retries allows",
    "DeadlineExceeded": "it took longer than the Job may",
}
_WAITING = {
    "CrashLoopBackOff": "{container} of the pod {pod} keeps ending: {message}",
    "CreateContainerConfigError": "the pod {pod} lacks a Secret or a ConfigMap, or a key of one: {message}",
    "CreateContainerError": "a container of the pod {pod} cannot be made: {message}",
    "ErrImageNeverPull": "the image {image} is not on the node, which may not pull it: {message}",
    "ErrImagePull": "the image {image} cannot be pulled: {message}",
    "ImagePullBackOff": "the image {image} cannot be pulled: {message}",
    "InvalidImageName": "{image} is not a name of an image: {message}",
    "RunContainerError": "a container of the pod {pod} cannot be started: {message}",
}


@dataclass(frozen=True)
class Found:
    """The objects of a submission in the cluster."""

    job: Object | None
    """The RayJob or the Job."""
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    """All events of the namespace."""
    workloads: Sequence[Object] = ()
    """All workloads of Kueue in the namespace."""


def job_state(found: Found) -> JobState:
    """The state of a job."""
    job = found.job
    if job is None:
        return JobState("DELETED", "it is not in the cluster any more; the run's files and its log are on the claim")
    ended = _ray_job_end(job) if job["kind"] == "RayJob" else _job_end(job)
    nodes = sorted({pod["spec"]["nodeName"] for pod in found.pods if pod["spec"].get("nodeName")})
    state, reason = ended or _active_state(found, job)
    if state == "FAILED":
        reason = "; ".join(filter(None, [reason, next(_out_of_memory(found.pods), "")]))
    return JobState(state, reason, ",".join(nodes), job.get("status", {}).get("failed", 0))


def has_ended(job: Object) -> bool:
    """Whether a RayJob or a Job has ended."""
    return (_ray_job_end(job) if job["kind"] == "RayJob" else _job_end(job)) is not None


def driver_pod(pods: Sequence[Object]) -> Object | None:
    """The pod with the driver's log; after several attempts, the newest."""
    drivers = [pod for pod in pods if is_driver(pod)]
    return max(drivers, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)


def is_over(pod: Object) -> bool:
    """Whether a pod has ended."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_driver(pod: Object) -> bool:
    """Whether a pod has the driver's log."""
    labels: dict[str, str] = pod["metadata"].get("labels", {})
    return labels.get(DRIVER) == "driver" or labels.get(INDEX) == "0"


def _ray_job_end(job: Object) -> tuple[str, str] | None:
    """State and reason of a RayJob that has ended."""
    status = job.get("status", {})
    deployment, name = status.get("jobDeploymentStatus"), job["metadata"]["name"]
    if deployment not in ("Complete", "Failed", "ValidationFailed"):
        return None
    if status.get("jobStatus") == "SUCCEEDED" and deployment == "Complete":
        return "DONE", ""
    if status.get("jobStatus") == "STOPPED":
        return "FAILED", _MEND_FIRST.format(name=name)
    reason = str(status.get("reason") or (deployment if deployment == "ValidationFailed" else ""))
    return "FAILED", _joined(_RAY_REASONS.get(reason, reason), status.get("message", ""))


def _job_end(job: Object) -> tuple[str, str] | None:
    """State and reason of an Indexed Job that has ended."""
    if _condition(job, "Complete"):
        return "DONE", ""
    failed = _condition(job, "Failed")
    if failed is None:
        return None
    reason, message = failed.get("reason", ""), failed.get("message", "")
    if reason == "PodFailurePolicy" and "exit code 2" in message:
        return "FAILED", _MEND_FIRST.format(name=job["metadata"]["name"])
    return "FAILED", _joined(_JOB_REASONS.get(reason, reason), message)


def _active_state(found: Found, job: Object) -> tuple[str, str]:
    """State and reason of a job that has not ended."""
    status = job.get("status", {})
    trouble = next(_troubles(found, job), "")
    if job["metadata"].get("deletionTimestamp"):
        return "ENDING", "it is being deleted"
    if job["spec"].get("suspend"):
        return "SUSPENDED", _why_suspended(found.workloads, job)
    if job["kind"] == "Job":
        if _condition(job, "FailureTarget") or _condition(job, "SuccessCriteriaMet"):
            return "ENDING", "its pods are being ended"
        running = _runs(driver_pod(found.pods))
        return ("RUNNING", trouble) if running else ("PENDING", trouble or "its pods are starting")
    deployment = status.get("jobDeploymentStatus", "")
    if deployment == "Retrying":
        return "RETRYING", _joined("the last attempt failed, and another begins", status.get("message", ""))
    if deployment == "Running" and (status.get("jobStatus") == "RUNNING" or _runs(driver_pod(found.pods))):
        return "RUNNING", trouble
    if not deployment and not status.get("jobId"):
        return "PENDING", trouble or "the KubeRay operator has not started it yet; is the operator running?"
    return "PENDING", trouble or "its pods are starting"


def _runs(pod: Object | None) -> bool:
    return pod is not None and pod.get("status", {}).get("phase") == "Running"


def _why_suspended(workloads: Sequence[Object], job: Object) -> str:
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue is None:
        return "it is suspended (spec.suspend)"
    uid = job["metadata"]["uid"]
    for workload in workloads:
        if any(owner.get("uid") == uid for owner in workload["metadata"].get("ownerReferences", [])):
            for kind in ("QuotaReserved", "Admitted", "Evicted"):
                message = _message_of(workload, kind)
                if message:
                    return f"the queue {queue} has not admitted it: {message}"
    return f"it waits for the queue {queue} to admit it"


def _message_of(workload: Object, kind: str) -> str:
    conditions = workload.get("status", {}).get("conditions", [])
    wanted = "True" if kind == "Evicted" else "False"
    return next((c.get("message", "") for c in conditions if c["type"] == kind and c["status"] == wanted), "")


def _troubles(found: Found, job: Object) -> Iterator[str]:
    """What keeps a job's pods from running, the most certain reason first."""
    pods = [pod for pod in found.pods if not pod["metadata"].get("deletionTimestamp")]
    for kind in (_waiting_containers, _unschedulable, _out_of_memory, _evicted):
        yield from kind(pods)
    yield from _failed_events(found, job)


def _waiting_containers(pods: Sequence[Object]) -> Iterator[str]:
    for pod, container in _containers(pods):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in _WAITING:
            yield _WAITING[waiting["reason"]].format(
                pod=pod["metadata"]["name"],
                container=container["name"],
                image=container.get("image"),
                message=waiting.get("message") or waiting["reason"],
            )


def _unschedulable(pods: Sequence[Object]) -> Iterator[str]:
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", []):
            if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
                name, message = pod["metadata"]["name"], condition.get("message", "")
                claim = re.search("persistentvolumeclaim|PersistentVolumeClaim", message)
                what = "waits for its claim" if claim else "finds no node"
                yield f"the pod {name} {what}: {message}"


def _out_of_memory(pods: Sequence[Object]) -> Iterator[str]:
    for pod, container in _containers(pods):
        ends = (container.get(state, {}).get("terminated") or {} for state in ("state", "lastState"))
        if any(end.get("reason") == "OOMKilled" for end in ends):
            role = pod["metadata"].get("labels", {}).get(DRIVER)
            field = "head.memory" if role == "head" else "memory_per_pod"
            name = pod["metadata"]["name"]
            yield f"the pod {name} took more memory than its limit (OOMKilled); raise cluster.k8s.{field}"


def _evicted(pods: Sequence[Object]) -> Iterator[str]:
    for pod in pods:
        status = pod.get("status", {})
        if status.get("phase") == "Failed" and status.get("reason"):
            yield f"the pod {pod['metadata']['name']}: {_joined(status['reason'], status.get('message', ''))}"


def _failed_events(found: Found, job: Object) -> Iterator[str]:
    """Events about pods that could not be made, or whose volumes could not be mounted."""
    own = {job["metadata"]["name"], job.get("status", {}).get("rayClusterName")}
    waiting = {pod["metadata"]["name"] for pod in found.pods if pod.get("status", {}).get("phase") == "Pending"}
    for event in sorted(found.events, key=_time, reverse=True):
        about, reason = event["involvedObject"].get("name"), event.get("reason", "")
        message = event.get("message", "")
        if event.get("type") != "Warning" or _time(event) < job["metadata"]["creationTimestamp"]:
            continue  # it is about an earlier job of this name
        if about in own and "exceeded quota" in message:
            yield f"a quota of the namespace does not let its pods be made: {message}"
        elif about in own and reason.startswith("Failed"):
            yield f"its pods cannot be made: {message}"
        elif about in waiting and reason in ("FailedMount", "FailedAttachVolume"):
            yield f"a volume of the pod {about} cannot be mounted: {message}"


def _containers(pods: Sequence[Object]) -> Iterator[tuple[Object, Object]]:
    for pod in pods:
        for kind in ("initContainerStatuses", "containerStatuses"):
            for container in pod.get("status", {}).get(kind, []):
                yield pod, container


def _condition(job: Object, kind: str) -> Object | None:
    """A condition that is true."""
    conditions: list[dict[str, Any]] = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _time(event: Object) -> str:
    """The time when an event happened last, to the second."""
    series = event.get("series") or {}
    when = event.get("lastTimestamp") or series.get("lastObservedTime") or event.get("eventTime") or ""
    return f"{when[:19]}Z"


def _joined(*parts: str | None) -> str:
    return ": ".join(filter(None, parts))
