"""Renders a job as Kubernetes objects. Asks no cluster, clock or host.

The job is a `RayJob` of the KubeRay operator, which makes a Ray cluster of a head pod, with the driver, and of worker
pods, and makes a new cluster after a failure. Without the operator it is an Indexed `Job` whose pods start Ray
themselves; its first pod has the head and the driver in addition to workers. Both run `clm-dist run` on the files on
the claim, so another attempt resumes the run.
"""

import shlex

import yaml

from clm_dist.config.job import JobConfig
from clm_dist.config.k8s import num_bytes, store_bytes
from clm_dist.config.load import job_text
from clm_dist.config.prometheus import PORT, listen_address
from clm_dist.config.yaml_text import Dumper, represent_text
from clm_dist.errors import ConfigError
from clm_dist.submit.in_pod.pod import CODE, DASHBOARD_PORT
from clm_dist.submit.k8s.pods import driver_command, pod_template, submitter_pod
from clm_dist.submit.k8s.request import Object, Request, hosts_of, metadata_of, selector, token_secret

_RAY_VERSION = "2.60.0"
"""Version of Ray in the image, which the operator needs."""
_MOST_NAME = 47
"""Longest name, in characters; the operator adds to it for services and pods."""
_SUBMITTER_RETRIES = 10


def check_job(job: JobConfig, request: Request) -> None:
    """Find what is wrong with a job for Kubernetes, without asking the cluster.

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
            f"the name {job.name} is not a name that Kubernetes allows: small letters, digits and dashes, a letter "
            f"first and {_MOST_NAME} at most; set another with --set name=...",
            field="name",
        )
    if job.name.endswith("-"):
        raise ConfigError(f"the name {job.name} ends with a dash, which Kubernetes does not allow", field="name")
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
    if request.code and "PYTHONPATH" in k8s.env:
        problem = "cluster.k8s.env sets PYTHONPATH, which --sync needs"
        raise ConfigError(f"{problem}; remove one of them", field="cluster.k8s.env")
    if "prometheus" in job.tracking and listen_address(k8s.env)[1] == 0:
        problem = f"cluster.k8s.env sets {PORT} to 0, and Prometheus must know the port; remove it, or name a port"
        raise ConfigError(problem, field="cluster.k8s.env")
    hosts_of(job.cluster).check()


def objects(job: JobConfig, request: Request) -> list[Object]:
    """The objects to apply, the job itself last."""
    made = [_config_map(job, request), _network_policy(job, request)]
    if request.plain:
        return [*made, _service(job), _indexed_job(job, request)]
    return [*made, _ray_job(job, request)]


def render(job: JobConfig, request: Request) -> str:
    """The objects as one YAML text."""
    return yaml.dump_all(objects(job, request), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(Dumper):
    """Writes texts of several lines as they are."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and not any(line.endswith(" ") for line in text.splitlines()) else None
    return represent_text(dumper, text, style)


_Dumper.add_representer(str, _represent_text)


def _config_map(job: JobConfig, request: Request) -> Object:
    data: Object = {"data": {"job.yaml": job_text(job)}}
    if request.code:
        data["binaryData"] = {CODE: request.code.archive}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata_of(job, job.name), **data}


def _network_policy(job: JobConfig, request: Request) -> Object:
    """Opens Ray's ports, where programs can be started, to the job's own pods, and the dashboard to the operator.

    The port of the run's figures, where it has one, is open to every Prometheus of the cluster.
    """
    ingress: list[Object] = [{"from": [{"podSelector": {"matchLabels": selector(job.name)}}]}]
    if not request.plain:
        operator = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
        ingress.append(
            {
                "from": [{"namespaceSelector": {}, "podSelector": operator}],
                "ports": [{"port": DASHBOARD_PORT, "protocol": "TCP"}],
            }
        )
    if "prometheus" in job.tracking:
        scraper = {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
        ingress.append(
            {
                "from": [{"namespaceSelector": {}, "podSelector": scraper}],
                "ports": [{"port": listen_address(job.cluster.k8s.env)[1], "protocol": "TCP"}],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata_of(job, job.name),
        "spec": {"podSelector": {"matchLabels": selector(job.name)}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _ray_job(job: JobConfig, request: Request) -> Object:
    k8s = job.cluster.k8s
    head, workers = pod_template(job, request, "head"), pod_template(job, request, "worker")
    spec: Object = {
        "entrypoint": shlex.join(driver_command(request)),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
        "submitterPodTemplate": submitter_pod(job, request),
        "backoffLimit": k8s.max_retries,
        "shutdownAfterJobFinishes": True,
    }
    if k8s.queue:
        spec["suspend"] = True
    elif k8s.start_deadline_s:
        spec["preRunningDeadlineSeconds"] = k8s.start_deadline_s
    spec["rayClusterSpec"] = {
        "rayVersion": _RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # Workers do not run on the head.
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
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata_of(job, job.name, labels), "spec": spec}


def _service(job: JobConfig) -> Object:
    """The Service that gives the pods of a plain job their host names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata_of(job, job.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(job.name),
            "ports": [{"name": "gcs", "port": 6379}],
        },
    }


def _indexed_job(job: JobConfig, request: Request) -> Object:
    k8s = job.cluster.k8s
    template = pod_template(job, request, "worker")
    template["spec"] |= {"restartPolicy": "Never", "subdomain": job.name}
    (container,) = template["spec"]["containers"]
    hosts = hosts_of(job.cluster)
    store = store_bytes(k8s.memory_per_pod)
    container["command"] = [
        *("python", "-m", "clm_dist.submit.in_pod.node"),
        f"--num-cpus={hosts.cpus}",
        f"--num-gpus={hosts.gpus}",
        f"--memory={num_bytes(k8s.memory_per_pod) - store}",
        f"--object-store-memory={store}",
        "--",
        *driver_command(request),
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
                # A person must mend the job first.
                {"action": "FailJob", "onExitCodes": {"containerName": "ray", "operator": "In", "values": [2]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        # The first pod has the driver; its success ends the others.
        "successPolicy": {"rules": [{"succeededIndexes": "0", "succeededCount": 1}]},
        "template": template,
    }
    if k8s.queue:
        spec = {"suspend": True, **spec}
    labels = _queue_labels(job)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata_of(job, job.name, labels), "spec": spec}


def _queue_labels(job: JobConfig) -> dict[str, str]:
    queue = job.cluster.k8s.queue
    return {"kueue.x-k8s.io/queue-name": queue} if queue else {}
