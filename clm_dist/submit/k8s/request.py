"""What the objects of a job need in addition to the job, and their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clm_dist.config.job import ClusterConfig, JobConfig
from clm_dist.submit.size import Hosts
from clm_dist.submit.submission import submitted_dir

Object = dict[str, Any]
"""A Kubernetes object, as its API takes it."""
_PART_OF = "clm-dist"


@dataclass(frozen=True)
class Code:
    """The code of a working tree, which replaces the image's."""

    archive: str
    """A zip file in base64."""
    commit: str
    """`1a2b3c4d5e6f`, with `-changed` if the tree differs from the commit."""


@dataclass(frozen=True)
class Request:
    """What the objects need in addition to the job."""

    resume: bool = False
    """Continue a run although its job has changed."""
    overwrite: bool = False
    """Remove the run of this name, and start again."""
    number: str = "1"
    """Distinguishes submissions of the same name."""
    plain: bool = False
    """An Indexed Job, for clusters without the operator."""
    code: Code | None = None


def hosts_of(cluster: ClusterConfig) -> Hosts:
    """The worker pods that a job asks for."""
    k8s = cluster.k8s
    cpus = k8s.cpus_per_pod or Hosts.cpus_for(cluster, k8s.pods)
    return Hosts(cluster, k8s.pods, k8s.gpus_per_pod, cpus, "cluster.k8s", "pod", "--pods", "--gpus-per-pod")


def state_dir(job: JobConfig) -> str:
    """The directory of the submission's files in the pods."""
    return str(submitted_dir(f"{job.cluster.k8s.mount}/runs", job.name))


def selector(name: str) -> dict[str, str]:
    """The labels of all objects and pods of a submission."""
    return {"app.kubernetes.io/instance": name, "app.kubernetes.io/part-of": _PART_OF}


def token_secret(name: str) -> str:
    """Name of the Secret of a plain job that holds Ray's token, in its key `auth_token`."""
    return f"{name}-ray"


def metadata_of(job: JobConfig, name: str, labels: Mapping[str, str] | None = None) -> Object:
    metadata: Object = {"name": name, "labels": {**selector(job.name), **(labels or {})}}
    if job.cluster.k8s.namespace:
        metadata["namespace"] = job.cluster.k8s.namespace
    return metadata
