"""The objects that submissions made: found in the cluster, told from those of others, deleted and waited for."""

import contextlib
import time

from clm_dist.errors import SubmitError
from clm_dist.submit.k8s import states
from clm_dist.submit.k8s.kubectl import ForbiddenError, Kubectl, NoKindError
from clm_dist.submit.k8s.request import Object, selector, token_secret
from clm_dist.submit.submission import Submission

RAY_JOB, JOB = "rayjob.ray.io", "job.batch"
RESOURCES = {
    **{"RayJob": RAY_JOB, "Job": JOB, "ConfigMap": "configmap", "Service": "service", "Secret": "secret"},
    "NetworkPolicy": "networkpolicy.networking.k8s.io",
}
"""The kinds that `submit` makes, as kubectl takes them."""
_POLL_S = 1.0
_GONE_WITHIN_S = 180
"""Time for the finalizers of the operator."""


def names_of(submission: Submission) -> list[str]:
    """What a submission makes, as kubectl takes it, its job first."""
    assert submission.k8s
    name = submission.name
    both = [f"{RESOURCES[kind]}/{name}" for kind in ("ConfigMap", "NetworkPolicy")]
    if submission.k8s.plain:
        return [f"{JOB}/{name}", *both, f"service/{name}", f"secret/{token_secret(name)}"]
    return [f"{RAY_JOB}/{name}", *both]


def is_ours(found: Object, name: str) -> bool:
    """Whether a submission of this name made an object."""
    return bool(selector(name).items() <= found["metadata"].get("labels", {}).items())


def is_active(job: Object) -> bool:
    """Whether a RayJob or a Job waits or runs. One that is being deleted does not: `submit` waits for its end."""
    return not states.has_ended(job) and not job["metadata"].get("deletionTimestamp")


def jobs_named(kubectl: Kubectl, name: str) -> list[Object]:
    """The RayJob and the Job of a name, whoever made them."""
    jobs = []
    for kind in (JOB, RAY_JOB):
        with contextlib.suppress(NoKindError, ForbiddenError):
            jobs.append(kubectl.get(kind, name))
    # The operator makes a Job of the RayJob's name, for the pod that submits.
    return [job for job in jobs if job and not job["metadata"].get("ownerReferences")]


def job_of(kubectl: Kubectl, submission: Submission) -> Object | None:
    """The job of a submission, if it is there."""
    found = kubectl.get(*names_of(submission)[0].split("/"))
    return found if found and is_ours(found, submission.name) else None


def others_named(kubectl: Kubectl, submission: Submission) -> list[Object]:
    """The objects with the names of a submission's other objects, whoever made them."""
    found = []
    for one in names_of(submission)[1:]:
        resource, _, name = one.partition("/")
        try:
            found.append(kubectl.get(resource, name))
        except ForbiddenError:  # a user who may not read Secrets may still make them
            kind = next(kind for kind, other in RESOURCES.items() if other == resource)
            found.append({"kind": kind, "metadata": {"name": name, "labels": selector(submission.name)}})
    return [one for one in found if one]


def pods_that_end(kubectl: Kubectl, name: str) -> list[Object]:
    """The pods of a name that have not ended. If its job is gone, they may still save."""
    return [pod for pod in kubectl.find("pods", selector(name)) if not states.is_over(pod)]


def delete_and_wait(kubectl: Kubectl, job: Object) -> None:
    """Delete a RayJob or a Job. Raises SubmitError if it is still there after a while."""
    kind, name = RESOURCES[job["kind"]], job["metadata"]["name"]
    kubectl.delete(f"{kind}/{name}")
    deadline = time.monotonic() + _GONE_WITHIN_S
    while kubectl.get(kind, name) is not None:
        if time.monotonic() > deadline:
            raise SubmitError(
                f"the {job['kind']} {name} of an earlier submission was deleted {_GONE_WITHIN_S} s ago, and is still "
                f"there; `kubectl describe {kind} {name} --namespace={kubectl.namespace}` shows what holds it"
            )
        time.sleep(_POLL_S)


def wait_for_pods(kubectl: Kubectl, name: str) -> None:
    """Wait until the pods of an earlier submission have saved and ended: a new driver takes the run from them.

    Raises:
        SubmitError: they are still there after their grace period.
    """
    began = time.monotonic()
    while pods := pods_that_end(kubectl, name):
        names = [pod["metadata"]["name"] for pod in pods]
        grace_s = max(pod["spec"].get("terminationGracePeriodSeconds", 0) for pod in pods)
        if time.monotonic() - began > grace_s + _GONE_WITHIN_S:
            where = f"{names[0]} --namespace={kubectl.namespace}"
            raise SubmitError(
                f"pods of the last submission of {name} are still there ({', '.join(names)}); `kubectl describe pod "
                f"{where}` shows what holds them; if its node is gone for good, `kubectl delete pod {where} --force`"
            )
        time.sleep(_POLL_S)
