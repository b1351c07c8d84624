"""The pods of a job: their commands, volumes and environment."""

from clm_dist.config.job import JobConfig
from clm_dist.config.k8s import shm_bytes
from clm_dist.config.prometheus import HOST
from clm_dist.submit.in_pod.pod import CODE, JOB_DIR, RAY_SETTINGS, RESERVE_S
from clm_dist.submit.k8s.request import Object, Request, hosts_of, selector, state_dir

_KEEP = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Annotations that keep node autoscalers from moving running pods."""


def driver_command(request: Request) -> list[str]:
    options = ["--resume"] if request.resume else []
    options += ["--overwrite"] if request.overwrite else []
    return ["python", "-m", "clm_dist.submit.in_pod.driver", *options]


def submitter_pod(job: JobConfig, request: Request) -> Object:
    """The pod that submits the driver to Ray and prints the run's log."""
    command = ["python", "-m", "clm_dist.submit.in_pod.submitter", *driver_command(request)]
    container = {
        "name": "driver",
        "image": job.cluster.k8s.image,
        "command": command,
        "env": environment_of(job, request),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": _container_security(),
        "volumeMounts": [_mount("tmp", "/tmp"), _mount("shared", job.cluster.k8s.mount), *_job_mounts()],
    }
    volumes = [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, *_shared_volumes(job)]
    spec = {**_pod_basics(job), "restartPolicy": "Never", "containers": [container], "volumes": volumes}
    labels = {**selector(job.name), "app.kubernetes.io/component": "driver"}
    return {"metadata": {"labels": labels, "annotations": dict(_KEEP)}, "spec": spec}


def pod_template(job: JobConfig, request: Request, role: str) -> Object:
    """The pod of Ray's head, or one of workers."""
    k8s = job.cluster.k8s
    is_head = role == "head"
    hosts = hosts_of(job.cluster)
    cpus, memory = (k8s.head.cpus, k8s.head.memory) if is_head else (hosts.cpus, k8s.memory_per_pod)
    limits = {"cpu": str(cpus), "memory": memory}
    if not is_head:
        limits |= {k8s.gpu_resource: str(hosts.gpus)} if hosts.gpus else {}
        limits |= k8s.resources
    environment = environment_of(job, request)
    if (is_head or not hosts.gpus) and "NVIDIA_VISIBLE_DEVICES" not in k8s.env:
        # With an image made for GPUs, a pod that asks for none would see all GPUs of its node.
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
        # It saves the run and keeps Ray's logs before the container is ended.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "clm_dist.submit.in_pod.end"]}}},
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


def environment_of(job: JobConfig, request: Request) -> list[Object]:
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
        # Seconds that the driver has to save after its job is stopped.
        "RAY_JOB_STOP_WAIT_TIME_S": str(k8s.grace_s - RESERVE_S),
        **RAY_SETTINGS,
    }
    if "prometheus" in job.tracking:
        # Of the pod, which the network policy opens to Prometheus alone.
        values[HOST] = "0.0.0.0"
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
