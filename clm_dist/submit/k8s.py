"""A job file as objects of Kubernetes. Pure: nothing here asks the cluster, the clock or the host.

A `RayJob` of the KubeRay operator: it makes a Ray cluster of a head, which has the driver, and of worker pods, and a
new one after a failure. Or, where there is no operator, an Indexed `Job` whose pods start Ray themselves; the first has
the head and the driver beside its workers. Both run `clm-dist run` on what lies on the claim, so trying again goes on.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from clm_dist.config.job import ClusterConfig, JobConfig
from clm_dist.config.k8s import num_bytes, shm_bytes, store_bytes
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError
from clm_dist.submit.pods import CODE, DASHBOARD_PORT, JOB_DIR, RAY_SETTINGS, RESERVE_S
from clm_dist.submit.size import Hosts
from clm_dist.submit.spec import submitted_dir

Object = dict[str, Any]
"""An object of Kubernetes, as its API takes it."""

_RAY_VERSION = "2.60.0"
"""Of the image; the operator wants to know."""
_MOST_NAME = 47
"""Characters: the operator makes the names of services and pods from that of a RayJob."""
_PART_OF = "clm-dist"
_SUBMITTER_RETRIES = 10
_KEEP = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Node autoscalers do not move what runs."""


@dataclass(frozen=True)
class Code:
    """The package of a working tree, which goes before the image's."""

    archive: str
    """A zip file in base64."""
    commit: str
    """`1a2b3c4d5e6f`, with `-changed` where the tree differs from it."""


@dataclass(frozen=True)
class Request:
    """What the objects need to know besides the job."""

    resume: bool = False
    """Go on with a run though its job has changed."""
    overwrite: bool = False
    """Remove the run of this name, and start again."""
    number: str = "1"
    """Tells a submission from others of its name."""
    plain: bool = False
    """An Indexed Job, for clusters without the operator."""
    code: Code | None = None


def hosts_of(cluster: ClusterConfig) -> Hosts:
    """The worker pods that a job asks for."""
    k8s = cluster.k8s
    cpus = k8s.cpus_per_pod or Hosts.cpus_for(cluster, k8s.pods)
    return Hosts(cluster, k8s.pods, k8s.gpus_per_pod, cpus, "cluster.k8s", "pod", "--workers", "--gpus-per-worker")


def check_job(job: JobConfig, request: Request) -> None:
    """Find what is wrong with a job for Kubernetes, as far as no cluster need be asked.

    Raises:
        ConfigError: its name, its image, or its size.
    """
    k8s = job.cluster.k8s
    if (
        len(job.name) > _MOST_NAME
        or not job.name[0].isalpha()
        or set(job.name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
    ):
        raise ConfigError(
            f"the name {job.name} cannot be one of Kubernetes, which takes small letters, digits and dashes, a letter "
            f"first and {_MOST_NAME} at most; set another with --set name=...",
            field="name",
        )
    if job.name.endswith("-"):
        raise ConfigError(f"the name {job.name} ends with a dash, which Kubernetes does not take", field="name")
    if k8s.image is None:
        raise ConfigError(
            "no image is named; build one that your cluster can pull as k8s/README.md says, and name it with --image "
            "or cluster.k8s.image",
            field="cluster.k8s.image",
        )
    if job.hub.push != "never" and k8s.secret is None:
        raise ConfigError(
            f"hub.push is {job.hub.push}, and the pods have no token; make a Secret in the job's namespace with "
            "`kubectl create secret generic hub --from-literal=HF_TOKEN=...`, and name it with --secret or "
            "cluster.k8s.secret",
            field="cluster.k8s.secret",
        )
    if request.plain and k8s.scheduler in ("volcano", "yunikorn"):
        raise ConfigError(
            f"cluster.k8s.scheduler {k8s.scheduler} is not supported with --plain: the operator makes its groups; "
            "leave out --plain, or take kueue",
            field="cluster.k8s.scheduler",
        )
    if request.code and "PYTHONPATH" in k8s.env:
        problem = "cluster.k8s.env sets PYTHONPATH, by which --sync puts its code before the image's"
        raise ConfigError(f"{problem}; leave out one of them", field="cluster.k8s.env")
    hosts_of(job.cluster).check()


def state_dir(job: JobConfig) -> str:
    """The submission's files, as the pods see them."""
    return str(submitted_dir(f"{job.cluster.k8s.mount}/runs", job.name))


def selector(name: str) -> dict[str, str]:
    """The labels of all objects and pods of a submission."""
    return {"app.kubernetes.io/instance": name, "app.kubernetes.io/part-of": _PART_OF}


def token_secret(name: str) -> str:
    """The Secret of a plain job with Ray's token, in its key `auth_token`."""
    return f"{name}-ray"


def objects(job: JobConfig, request: Request) -> list[Object]:
    """What is applied, the job itself last."""
    made = [_config_map(job, request), _network_policy(job, request)]
    if request.plain:
        return [*made, _service(job), _indexed_job(job, request)]
    return [*made, _ray_job(job, request)]


def render(job: JobConfig, request: Request) -> str:
    """The objects as one YAML text."""
    return yaml.dump_all(objects(job, request), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and not any(line.endswith(" ") for line in text.splitlines()) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _metadata(job: JobConfig, name: str, labels: Mapping[str, str] | None = None) -> Object:
    metadata: Object = {"name": name, "labels": {**selector(job.name), **(labels or {})}}
    if job.cluster.k8s.namespace:
        metadata["namespace"] = job.cluster.k8s.namespace
    return metadata


def _config_map(job: JobConfig, request: Request) -> Object:
    data: Object = {"data": {"job.yaml": job_text(job)}}
    if request.code:
        data["binaryData"] = {CODE: request.code.archive}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, job.name), **data}


def _network_policy(job: JobConfig, request: Request) -> Object:
    """Whoever reaches Ray's ports could run programs; so only the job's own pods do, and the operator the dashboard."""
    ingress: list[Object] = [{"from": [{"podSelector": {"matchLabels": selector(job.name)}}]}]
    if not request.plain:
        operator = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
        ingress.append(
            {
                "from": [{"namespaceSelector": {}, "podSelector": operator}],
                "ports": [{"port": DASHBOARD_PORT, "protocol": "TCP"}],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, job.name),
        "spec": {"podSelector": {"matchLabels": selector(job.name)}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _ray_job(job: JobConfig, request: Request) -> Object:
    k8s = job.cluster.k8s
    head, workers = _pod(job, request, "head"), _pod(job, request, "worker")
    spec: Object = {
        "entrypoint": shlex.join(_driver(request)),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
        "submitterPodTemplate": _submitter(job, request),
        "backoffLimit": k8s.max_retries,
        "shutdownAfterJobFinishes": True,
    }
    if k8s.scheduler == "kueue":
        spec["suspend"] = True
    elif k8s.start_deadline_s and k8s.queue is None:
        spec["preRunningDeadlineSeconds"] = k8s.start_deadline_s
    spec["rayClusterSpec"] = {
        "rayVersion": _RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # Workers do not run there.
            "rayStartParams": {"num-cpus": "0", "object-store-memory": str(store_bytes(k8s.head.memory))},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": k8s.pods,
                "minReplicas": k8s.pods,
                "maxReplicas": k8s.pods,
                "rayStartParams": {"object-store-memory": str(store_bytes(k8s.memory_per_pod))},
                "template": workers,
            }
        ],
    }
    labels = _queue_labels(job)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(job, job.name, labels), "spec": spec}


def _service(job: JobConfig) -> Object:
    """Gives the pods of a plain job their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, job.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(job.name),
            "ports": [{"name": "gcs", "port": 6379}],
        },
    }


def _indexed_job(job: JobConfig, request: Request) -> Object:
    k8s = job.cluster.k8s
    template = _pod(job, request, "worker")
    template["spec"] |= {"restartPolicy": "Never", "subdomain": job.name}
    (container,) = template["spec"]["containers"]
    hosts = hosts_of(job.cluster)
    store = store_bytes(k8s.memory_per_pod)
    container["command"] = [
        *("python", "-m", "clm_dist.submit.pod_node"),
        f"--num-cpus={hosts.cpus}",
        f"--num-gpus={hosts.gpus}",
        f"--memory={num_bytes(k8s.memory_per_pod) - store}",
        f"--object-store-memory={store}",
        "--",
        *_driver(request),
    ]
    token = {"secretKeyRef": {"name": token_secret(job.name), "key": "auth_token"}}
    container["env"] += [
        {"name": "CLM_DIST_HEAD", "value": f"{job.name}-0.{job.name}"},
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
    ]
    spec: Object = {
        "completionMode": "Indexed",
        "completions": k8s.pods,
        "parallelism": k8s.pods,
        "backoffLimit": k8s.max_retries * k8s.pods,
        "podFailurePolicy": {
            "rules": [
                # The job file's fault, which trying again does not mend.
                {"action": "FailJob", "onExitCodes": {"containerName": "ray", "operator": "In", "values": [2]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        # The first has the driver, and with its success the others are ended.
        "successPolicy": {"rules": [{"succeededIndexes": "0", "succeededCount": 1}]},
        "template": template,
    }
    if k8s.scheduler == "kueue":
        spec = {"suspend": True, **spec}
    labels = _queue_labels(job)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job, job.name, labels), "spec": spec}


def _driver(request: Request) -> list[str]:
    options = ["--resume"] if request.resume else []
    options += ["--overwrite"] if request.overwrite else []
    return ["python", "-m", "clm_dist.submit.pod_driver", *options]


def _queue_labels(job: JobConfig) -> dict[str, str]:
    k8s = job.cluster.k8s
    labels = {}
    if k8s.scheduler == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = str(k8s.queue)
    elif k8s.scheduler == "yunikorn":
        labels |= {"ray.io/gang-scheduling-enabled": "true", "yunikorn.apache.org/app-id": job.name}
        labels |= {"yunikorn.apache.org/queue": k8s.queue} if k8s.queue else {}
    elif k8s.queue:
        labels["volcano.sh/queue-name"] = k8s.queue
    if k8s.scheduler in ("volcano", "yunikorn") and k8s.priority_class:
        labels["ray.io/priority-class-name"] = k8s.priority_class
    return labels


def _submitter(job: JobConfig, request: Request) -> Object:
    """The pod that submits the driver to Ray and follows it; its log is that of the run."""
    command = ["python", "-m", "clm_dist.submit.ray_submitter", *_driver(request)]
    container = {
        "name": "driver",
        "image": job.cluster.k8s.image,
        "command": command,
        "env": _environment(job, request),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": _container_security(),
        "volumeMounts": [_mount("tmp", "/tmp"), _mount("shared", job.cluster.k8s.mount), *_job_mounts()],
    }
    volumes = [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, *_shared_volumes(job)]
    spec = {**_pod_basics(job), "restartPolicy": "Never", "containers": [container], "volumes": volumes}
    labels = {**selector(job.name), "app.kubernetes.io/component": "driver"}
    return {"metadata": {"labels": labels, "annotations": dict(_KEEP)}, "spec": spec}


def _pod(job: JobConfig, request: Request, role: str) -> Object:
    """The pod of Ray's head, or one of workers."""
    k8s = job.cluster.k8s
    is_head = role == "head"
    hosts = hosts_of(job.cluster)
    cpus, memory = (k8s.head.cpus, k8s.head.memory) if is_head else (hosts.cpus, k8s.memory_per_pod)
    limits = {"cpu": str(cpus), "memory": memory}
    if not is_head:
        limits |= {k8s.gpu_resource: str(hosts.gpus)} if hosts.gpus else {}
        limits |= k8s.resources
    environment = _environment(job, request)
    if (is_head or not hosts.gpus) and "NVIDIA_VISIBLE_DEVICES" not in k8s.env:
        # An image made for GPUs would show a pod without any all those of its node.
        environment.append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"})
    container: Object = {
        "name": "ray",
        "image": k8s.image,
        "env": environment,
        "resources": {"requests": limits, "limits": limits},
        "securityContext": _container_security(),
        "volumeMounts": [
            _mount("shm", "/dev/shm"),
            _mount("tmp", "/tmp"),
            _mount("shared", k8s.mount),
            *_job_mounts(),
        ],
        # The run saves, and Ray's logs are kept, before anything is ended.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "clm_dist.submit.pod_end"]}}},
    }
    if k8s.secret:
        container["envFrom"] = [{"secretRef": {"name": k8s.secret}}]
    spec = {
        **_pod_basics(job),
        "terminationGracePeriodSeconds": k8s.grace_s,
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(shm_bytes(memory))}},
            {"name": "tmp", "emptyDir": {"sizeLimit": k8s.scratch}},
            *_shared_volumes(job),
        ],
    }
    labels = {**selector(job.name), "app.kubernetes.io/component": role}
    if not is_head:
        spec |= {"nodeSelector": k8s.node_selector} if k8s.node_selector else {}
        spec |= {"tolerations": k8s.tolerations} if hosts.gpus and k8s.tolerations else {}
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ]
    return {"metadata": {"labels": labels, "annotations": dict(_KEEP)}, "spec": spec}


def _pod_basics(job: JobConfig) -> Object:
    k8s = job.cluster.k8s
    basics: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            **({"runAsUser": k8s.user} if k8s.user else {}),
            **({"runAsGroup": k8s.group, "fsGroup": k8s.group} if k8s.group else {}),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    basics |= {"imagePullSecrets": [{"name": k8s.pull_secret}]} if k8s.pull_secret else {}
    basics |= {"priorityClassName": k8s.priority_class} if k8s.priority_class else {}
    return basics


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _environment(job: JobConfig, request: Request) -> list[Object]:
    k8s = job.cluster.k8s
    values = {
        "HOME": "/tmp/home",
        "HF_HOME": f"{k8s.mount}/hf",
        "PYTHONUNBUFFERED": "1",
        "CLM_DIST_RUNS": f"{k8s.mount}/runs",
        "CLM_DIST_STORE": k8s.store or f"{k8s.mount}/store",
        "CLM_DIST_STATE": state_dir(job),
        "CLM_DIST_NODES": str(k8s.pods + (not request.plain)),
        "CLM_DIST_GRACE_S": str(k8s.grace_s),
        "CLM_DIST_SUBMISSION": request.number,
        # Seconds that the driver has to save, where its job is stopped.
        "RAY_JOB_STOP_WAIT_TIME_S": str(k8s.grace_s - RESERVE_S),
        **RAY_SETTINGS,
    }
    if request.code:
        values |= {"PYTHONPATH": f"{JOB_DIR}/{CODE}", "CLM_DIST_COMMIT": request.code.commit}
    return [
        *({"name": name, "value": value} for name, value in {**values, **k8s.env}.items()),
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]


def _mount(name: str, path: str) -> Object:
    return {"name": name, "mountPath": path}


def _job_mounts() -> list[Object]:
    return [{**_mount("job", JOB_DIR), "readOnly": True}]


def _shared_volumes(job: JobConfig) -> list[Object]:
    return [
        {"name": "shared", "persistentVolumeClaim": {"claimName": job.cluster.k8s.claim}},
        {"name": "job", "configMap": {"name": job.name}},
    ]
