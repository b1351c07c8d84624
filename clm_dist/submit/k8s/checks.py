"""Finds what a Kubernetes cluster lacks for a job, before anything is made."""

import contextlib
import re
from collections.abc import Iterator, Sequence

from clm_dist.config.job import JobConfig
from clm_dist.config.k8s import amount
from clm_dist.errors import ConfigError, SubmitError
from clm_dist.submit.k8s.kubectl import ForbiddenError, Kubectl, NoKindError, NoKubectlError
from clm_dist.submit.k8s.request import Object, Request

_PLAIN_SINCE = (1, 31)
"""The first version of Kubernetes that ends a Job when its first pod succeeds."""
_KUEUE = "kueue.x-k8s.io"
_CLAIM = """\
kubectl --namespace={namespace} apply -f - <<END
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {claim}}}
spec:
  accessModes: [ReadWriteMany]
  resources: {{requests: {{storage: 500Gi}}}}
END"""


def check_cluster(kubectl: Kubectl, job: JobConfig, request: Request, objects: Sequence[Object]) -> None:
    """Check that the cluster has what a job needs. Skips what the user may not ask.

    Args:
        objects: the objects to apply.

    Raises:
        ConfigError: something is missing, or a quota is too small.
        SubmitError: there is no kubectl, or no cluster answers.
    """
    try:
        version = kubectl.raw("/version")
    except NoKubectlError:
        raise
    except SubmitError as error:
        raise type(error)(
            f"no cluster answers: {error}\n`kubectl config get-contexts` lists those that kubectl knows"
        ) from None
    with contextlib.suppress(ForbiddenError):
        if kubectl.get("namespace", kubectl.namespace) is None:
            raise ConfigError(
                f"the namespace {kubectl.namespace} does not exist; name another with --namespace, or make it "
                f"with `kubectl create namespace {kubectl.namespace}`",
                field="cluster.k8s.namespace",
            )
    groups = {version["groupVersion"] for group in kubectl.raw("/apis")["groups"] for version in group["versions"]}
    if request.plain:
        _check_version(version)
    elif "ray.io/v1" not in groups:
        raise ConfigError(
            "the cluster does not know RayJob of ray.io/v1: the KubeRay operator is not installed; ask for it "
            "(k8s/README.md), or submit with --plain, which needs Kubernetes 1.31 and no operator"
        )
    if queue := job.cluster.k8s.queue:
        _check_queue(kubectl, queue, has_kueue=any(group.startswith(f"{_KUEUE}/") for group in groups))
    _check_claim(kubectl, job)
    _check_secrets(kubectl, job)
    _check_quotas(kubectl, objects)


def _check_version(version: dict[str, str]) -> None:
    major, minor = (int(re.sub(r"\D", "", version[part])) for part in ("major", "minor"))  # there are 31+
    if (major, minor) < _PLAIN_SINCE:
        raise ConfigError(
            f"the cluster has Kubernetes {major}.{minor}, and --plain needs {'.'.join(map(str, _PLAIN_SINCE))}: an "
            "older one does not end a Job with its first pod; submit without --plain if the cluster has the KubeRay "
            "operator"
        )


def _check_queue(kubectl: Kubectl, queue: str, *, has_kueue: bool) -> None:
    field = "cluster.k8s.queue"
    if not has_kueue:
        raise ConfigError(
            f"the cluster does not have Kueue, which starts the jobs of the queue {queue}; ask for it, or submit "
            "without a queue",
            field=field,
        )
    with contextlib.suppress(ForbiddenError):
        names = [found["metadata"]["name"] for found in kubectl.find(f"localqueues.{_KUEUE}")]
        if queue not in names:
            there = f"there are {', '.join(sorted(names))}" if names else "there is none at all"
            raise ConfigError(f"the queue {queue} does not exist in {kubectl.namespace}; {there}", field=field)


def _check_claim(kubectl: Kubectl, job: JobConfig) -> None:
    claim = job.cluster.k8s.claim
    with contextlib.suppress(ForbiddenError):
        if kubectl.get("persistentvolumeclaim", claim) is None:
            makes = _CLAIM.format(namespace=kubectl.namespace, claim=claim)
            raise ConfigError(
                f"the PersistentVolumeClaim {claim} does not exist in {kubectl.namespace}; name another with --claim, "
                f"or make it (see k8s/README.md):\n{makes}",
                field="cluster.k8s.claim",
            )


def claim_warning(kubectl: Kubectl, job: JobConfig) -> str | None:
    """A warning if several nodes cannot mount the claim at the same time."""
    with contextlib.suppress(ForbiddenError):
        claim = kubectl.get("persistentvolumeclaim", job.cluster.k8s.claim) or {}
        modes = claim.get("spec", {}).get("accessModes", [])
        if modes and "ReadWriteMany" not in modes:
            return (
                f"the claim {job.cluster.k8s.claim} is {', '.join(modes)}, which is enough only if all pods run on one "
                "node; otherwise pods wait for it without end; make it ReadWriteMany"
            )
    return None


def _check_secrets(kubectl: Kubectl, job: JobConfig) -> None:
    k8s = job.cluster.k8s
    for name, field in ((k8s.secret, "cluster.k8s.secret"), (k8s.pull_secret, "cluster.k8s.pull_secret")):
        if name is None:
            continue
        with contextlib.suppress(ForbiddenError):
            secret = kubectl.get("secret", name)
            if secret is None:
                kind = "generic" if name == k8s.secret else "docker-registry"
                raise ConfigError(
                    f"the Secret {name} does not exist in {kubectl.namespace}; make it with `kubectl create secret "
                    f"{kind} {name} --namespace={kubectl.namespace} ...`",
                    field=field,
                )
            if name == k8s.secret and job.hub.push != "never" and "HF_TOKEN" not in secret.get("data", {}):
                raise ConfigError(
                    f"the Secret {name} has no key HF_TOKEN, and hub.push is {job.hub.push}; make it again with "
                    f"`kubectl create secret generic {name} --namespace={kubectl.namespace} "
                    "--from-literal=HF_TOKEN=...`, or set hub.push to never",
                    field=field,
                )


def _check_quotas(kubectl: Kubectl, objects: Sequence[Object]) -> None:
    asked = asked_of(objects)
    lacking = []
    with contextlib.suppress(ForbiddenError, NoKindError):
        for quota in kubectl.find("resourcequotas"):
            lacking += [f"of {quota['metadata']['name']}: {line}" for line in lacking_of(quota, asked)]
    if lacking:
        raise ConfigError(
            f"a quota of {kubectl.namespace} is too small; wait for other jobs to end, or ask for less with --pods, "
            "--gpus-per-pod, or --set cluster.k8s.cpus_per_pod and memory_per_pod (`kubectl describe quota "
            f"--namespace={kubectl.namespace}`):\n" + "\n".join(lacking)
        )


def asked_of(objects: Sequence[Object]) -> dict[str, float]:
    """The resources that all pods of a job ask for together, by their names in a ResourceQuota."""
    asked: dict[str, float] = {}
    for count, template in _templates(objects):
        asked["pods"] = asked.get("pods", 0) + count
        for container in template["spec"]["containers"]:
            for kind, values in container["resources"].items():
                for name, value in values.items():
                    names = [f"{kind}.{name}"] + ([name] if kind == "requests" else [])
                    for key in names:
                        asked[key] = asked.get(key, 0) + count * amount(str(value))
    return asked


def lacking_of(quota: Object, asked: dict[str, float]) -> Iterator[str]:
    """A line for each resource of a quota of which less is left than the job asks for."""
    if quota["spec"].get("scopes") or quota["spec"].get("scopeSelector"):
        return  # the quota is for some pods only
    status = quota.get("status", {})
    for name, hard in status.get("hard", {}).items():
        used = status.get("used", {}).get(name, "0")
        wanted = asked.get(name.removeprefix("count/"), 0)
        if wanted > amount(str(hard)) - amount(str(used)):
            yield f"{name} is {hard}, of which {used} are used, and the job asks for {_shown(wanted)}"


def _shown(value: float) -> str:
    return f"{value / 2**30:g}Gi" if value >= 2**30 else f"{value:g}"


def _templates(objects: Sequence[Object]) -> Iterator[tuple[int, Object]]:
    """The templates of pods, each with the number of its pods."""
    for made in objects:
        spec = made.get("spec", {})
        if made["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            yield 1, cluster["headGroupSpec"]["template"]
            yield 1, spec["submitterPodTemplate"]
            yield from ((group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"])
        elif made["kind"] == "Job":
            yield spec["parallelism"], spec["template"]
