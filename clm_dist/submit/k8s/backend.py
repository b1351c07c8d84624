"""Submit to Kubernetes, look at it and cancel it."""

import base64
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError, SubmitError
from clm_dist.files.atomic import make_dir, write_text
from clm_dist.progress import read_training
from clm_dist.submit.k8s import render, states
from clm_dist.submit.k8s.checks import check_cluster
from clm_dist.submit.k8s.kubectl import ForbiddenError, Kubectl, NoKindError
from clm_dist.submit.k8s.request import Object, Request, selector, token_secret
from clm_dist.submit.states import RunState
from clm_dist.submit.submission import Place, Submission

_LAST_LINES = 200
_POLL_S = 1.0
_GONE_WITHIN_S = 180
"""A job that has ended; its finalizers are the operator's."""
_RAY_JOB, _JOB = "rayjob.ray.io", "job.batch"
_RESOURCES = {
    **{"RayJob": _RAY_JOB, "Job": _JOB, "ConfigMap": "configmap", "Service": "service", "Secret": "secret"},
    "NetworkPolicy": "networkpolicy.networking.k8s.io",
}
"""The kinds that `submit` makes, as kubectl takes them."""


@dataclass(frozen=True)
class Launch:
    """A job, and where it is submitted to."""

    job: JobConfig
    request: Request
    submission: Submission
    kubectl: Kubectl

    @property
    def objects(self) -> list[Object]:
        """What is applied, the job itself last."""
        made = render.objects(self.job, self.request)
        if self.request.plain:
            made.insert(0, _token(self.job.name))
        return made


def check_submission(launch: Launch) -> None:
    """Find what is wrong with a submission while nothing is made yet.

    Raises:
        ConfigError: the cluster lacks something, a run of its name is active, or somebody else's object has its name.
        SubmitError: there is no kubectl, no cluster answers, or the server refuses an object.
    """
    kubectl, name = launch.kubectl, launch.job.name
    objects = launch.objects
    check_cluster(kubectl, launch.job, launch.request, objects)
    jobs = _jobs(kubectl, name)
    for found in [*jobs, *_others(kubectl, launch.submission)]:
        if not _is_ours(found, name):
            what = f"{found['kind']} {found['metadata']['name']} in {kubectl.namespace}"
            raise ConfigError(
                f"there is a {what} that clm-dist has not made, and it stays as it is; make another run with --set "
                "name=..., or use another namespace with --namespace",
                field="name",
            )
    for found in jobs:
        if _goes_on(found):
            what = f"{found['kind'].lower()}/{name} in the namespace {kubectl.namespace}"
            raise ConfigError(
                f"{name} is queued or running already, as {what}; see it with `clm-dist status {name}`, end it with "
                f"`clm-dist cancel {name}` (where it was not submitted from here, with `kubectl delete "
                f"{found['kind'].lower()} {name} --namespace={kubectl.namespace}`), or make another run with --set "
                "name=...",
                field="name",
            )
    *others, job = objects
    if any(found["kind"] == job["kind"] for found in jobs):
        # What has ended gives way only when the server takes the new one, and could not become that.
        job = {**job, "metadata": {**job["metadata"], "name": f"check-{secrets.token_hex(4)}"}}
    try:
        kubectl.apply([*others, job], dry_run=True)
    except SubmitError as error:
        if "unknown field" not in str(error) or launch.request.plain:
            raise
        advice = (
            "it may be that of a KubeRay operator older than 1.6, which lacks fields; renew it, or submit with --plain"
        )
        raise SubmitError(f"the cluster does not take the RayJob; {advice}\n{error}") from None


def pods_that_end(launch: Launch) -> list[Object]:
    """Pods of an earlier submission of this name, whose job is gone and which may still save."""
    pods = launch.kubectl.find("pods", pod_labels(launch.submission))
    return [pod for pod in pods if not states.is_over(pod)]


def submit(launch: Launch) -> Submission:
    """Make a job's objects, and remember the submission. What was made is removed where one is refused.

    Raises:
        SubmitError: all that the server says.
    """
    kubectl, submission = launch.kubectl, launch.submission
    make_dir(submission.root)
    write_text(submission.files(0).job, job_text(launch.job))
    for found in _jobs(kubectl, launch.job.name):
        _delete_and_wait(kubectl, found)
    _wait_for_pods(launch)
    try:
        kubectl.apply(launch.objects)
        submitted = replace(submission, submitted=time.time())
        submitted.write()
    except BaseException as error:  # Ctrl-C, too: what is there by then is known to nobody
        try:
            kubectl.delete(*_names(submission))
        except SubmitError as second:
            what = ", ".join(_names(submission))
            raise SubmitError(f"{error}\nwhat was made may still be there ({what}): {second}") from error
        raise
    return submitted


def run_state(submission: Submission) -> RunState:
    """How far a submission is. Raises SubmitError where the cluster does not answer."""
    kubectl, name = Kubectl.at(_place(submission)), submission.name
    found = _find(kubectl, submission)
    job = states.job_state(found)
    progress: dict[str, Any] = {}
    driver = states.driver_pod(found.pods)
    if driver is not None:
        with contextlib.suppress(SubmitError):  # it has not started, or is gone
            lines = kubectl.last_lines(driver["metadata"]["name"], _LAST_LINES)
            if training := read_training(lines):
                progress = vars(training)
    result = {"status": "done"} if job.state == "DONE" else None
    return RunState(name, str(submission.job_id), job, result=result, **progress)


def is_active(submission: Submission) -> bool:
    """Whether a submission's job waits or runs."""
    job = _job_of(Kubectl.at(_place(submission)), submission)
    return job is not None and _goes_on(job)


def cancel(submission: Submission) -> bool:
    """Delete what a submission has made; false where its job is not there."""
    kubectl = Kubectl.at(_place(submission))
    job = _job_of(kubectl, submission)
    found = [*([job] if job else []), *(one for one in _others(kubectl, submission) if _is_ours(one, submission.name))]
    if found:
        kubectl.delete(*(f"{_RESOURCES[one['kind']]}/{one['metadata']['name']}" for one in found))
    return job is not None


def pod_labels(submission: Submission) -> dict[str, str]:
    """The labels of a submission's pods."""
    return selector(submission.name)


def _find(kubectl: Kubectl, submission: Submission) -> states.Found:
    """What the cluster has of a submission."""
    job = _job_of(kubectl, submission)
    pods = kubectl.find("pods", pod_labels(submission)) if job else []
    if job is None or states.has_ended(job):
        return states.Found(job, pods)
    events: Sequence[Object] = ()
    workloads: Sequence[Object] = ()
    with contextlib.suppress(ForbiddenError):
        events = kubectl.find("events")
    if job["spec"].get("suspend"):
        # Without Kueue there are none.
        with contextlib.suppress(SubmitError):
            workloads = kubectl.find("workloads.kueue.x-k8s.io")
    return states.Found(job, pods, events, workloads)


def _jobs(kubectl: Kubectl, name: str) -> list[Object]:
    """The RayJob and the Job of a name, whosever."""
    jobs = []
    for kind in (_JOB, _RAY_JOB):
        with contextlib.suppress(NoKindError, ForbiddenError):
            jobs.append(kubectl.get(kind, name))
    # The operator makes a Job of the RayJob's name, for the pod that submits.
    return [job for job in jobs if job and not job["metadata"].get("ownerReferences")]


def _job_of(kubectl: Kubectl, submission: Submission) -> Object | None:
    found = kubectl.get(*_names(submission)[0].split("/"))
    return found if found and _is_ours(found, submission.name) else None


def _others(kubectl: Kubectl, submission: Submission) -> list[Object]:
    """What there is of the names of a submission's other objects, whosever."""
    found = []
    for one in _names(submission)[1:]:
        try:
            found.append(kubectl.get(*one.split("/")))
        except ForbiddenError:  # who may not read Secrets may make them
            kind, name = (
                next(kind for kind, resource in _RESOURCES.items() if one.startswith(resource)),
                submission.name,
            )
            found.append({"kind": kind, "metadata": {"name": one.partition("/")[2], "labels": selector(name)}})
    return [one for one in found if one]


def _names(submission: Submission) -> list[str]:
    """What a submission makes, as kubectl takes it, its job first."""
    name = submission.name
    both = [f"{_RESOURCES[kind]}/{name}" for kind in ("ConfigMap", "NetworkPolicy")]
    if _place(submission).plain:
        return [f"{_JOB}/{name}", *both, f"service/{name}", f"secret/{token_secret(name)}"]
    return [f"{_RAY_JOB}/{name}", *both]


def _goes_on(job: Object) -> bool:
    """Whether a job waits or runs; one that is deleted goes when its finalizers are through, and is waited for."""
    return not states.has_ended(job) and not job["metadata"].get("deletionTimestamp")


def _is_ours(found: Object, name: str) -> bool:
    return bool(selector(name).items() <= found["metadata"].get("labels", {}).items())


def _delete_and_wait(kubectl: Kubectl, job: Object) -> None:
    kind, name = _RESOURCES[job["kind"]], job["metadata"]["name"]
    kubectl.delete(f"{kind}/{name}")
    deadline = time.monotonic() + _GONE_WITHIN_S
    while kubectl.get(kind, name) is not None:
        if time.monotonic() > deadline:
            raise SubmitError(
                f"the {job['kind']} {name} of an earlier submission is deleted, and there after {_GONE_WITHIN_S} s; "
                f"`kubectl describe {kind} {name} --namespace={kubectl.namespace}` shows what holds it"
            )
        time.sleep(_POLL_S)


def _wait_for_pods(launch: Launch) -> None:
    """Until what an earlier submission left has saved and ended: a driver that begins takes the run from it."""
    began = time.monotonic()
    while pods := pods_that_end(launch):
        names = [pod["metadata"]["name"] for pod in pods]
        grace_s = max(pod["spec"].get("terminationGracePeriodSeconds", 0) for pod in pods)
        if time.monotonic() - began > grace_s + _GONE_WITHIN_S:
            where = f"{names[0]} --namespace={launch.kubectl.namespace}"
            raise SubmitError(
                f"pods of the last submission of {launch.job.name} are still there ({', '.join(names)}); `kubectl "
                f"describe pod {where}` shows what holds them; if its node is gone for good, `kubectl delete pod "
                f"{where} --force`"
            )
        time.sleep(_POLL_S)


def _token(name: str) -> Object:
    """The key without which nobody uses the Ray of a plain job."""
    key = base64.b64encode(secrets.token_hex(32).encode()).decode()
    metadata = {"name": token_secret(name), "labels": selector(name)}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": {"auth_token": key}}


def _place(submission: Submission) -> Place:
    assert submission.k8s
    return submission.k8s
