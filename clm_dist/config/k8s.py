"""The section `cluster.k8s` of a job file: the resources and the pods of a job on Kubernetes."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from clm_dist.config.section import MOST, Count, Section, without_removed, wrong

_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("", "k", "M", "G", "T", "P", "E"))},
    **{f"{unit}i": 1024**power for power, unit in enumerate("KMGTPE", start=1)},
    **{"n": 1e-9, "u": 1e-6, "m": 1e-3},
}
_SIZES = ("k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti")
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_KEY = r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_REMOVED = {"scheduler": "remove it: cluster.k8s.queue names a queue of Kueue, and no other scheduler is supported"}
_LEAST_BYTES = 2**30
"""With less, the object store, a part of /dev/shm, would be smaller than Ray allows."""


def amount(quantity: str) -> float:
    """The value of a Kubernetes quantity: `100m`, `16Gi`, `1e3`."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", quantity)
    assert match, quantity
    return float(match[1]) * float(_UNITS[match[2]])


def num_bytes(quantity: str) -> int:
    """Bytes of a quantity such as `16Gi`."""
    return int(amount(quantity))


def _quantity(text: str) -> str:
    if not re.fullmatch(rf"\d+(\.\d+)?({'|'.join(_SIZES)})?", text):
        raise PydanticCustomError("quantity", "not a Kubernetes quantity; write it as 16Gi or 500M")
    return text


def _memory(text: str) -> str:
    if num_bytes(_quantity(text)) < _LEAST_BYTES:
        raise PydanticCustomError("quantity", "less than 1Gi, which is too little for Ray")
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
Memory = Annotated[str, AfterValidator(_memory)]
Name = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=253)]
"""Name of a Kubernetes object."""
Text = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f]+$")]
Key = Annotated[str, Field(pattern=f"^{_KEY}$")]
"""Key of a label, or name of a resource such as `nvidia.com/gpu`."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Directory = Annotated[str, Field(pattern=r"^/[^\x00-\x1f:]*[^/\x00-\x1f:]$")]


class HeadPod(Section):
    """The pod of Ray's head and the driver. It has no GPU."""

    cpus: Count = 2
    """CPUs."""
    memory: Memory = "8Gi"
    """Memory; the driver holds one copy of the final model in it."""


class K8sConfig(Section):
    """A job on Kubernetes: its pods, its storage, and the image in which clm-dist is installed."""

    image: Text | None = None
    """Container image of all pods."""
    pull_secret: Name | None = None
    """Secret with which the image is pulled."""
    namespace: Annotated[str, Field(pattern=f"^{_LABEL}$", max_length=63)] | None = None
    """Namespace; null is that of kubectl's current context."""
    pods: Count = 1
    """Pods with workers."""
    gpus_per_pod: Annotated[int, Field(ge=0, le=MOST)] = 0
    """GPUs of each of them."""
    cpus_per_pod: Count | None = None
    """CPUs of each of them; null is as many as its workers take."""
    memory_per_pod: Memory = "16Gi"
    """Memory of each of them; a quarter of it, 16Gi at most, is /dev/shm."""
    scratch: Quantity = "20Gi"
    """Local disk of each pod, for checkpoints that are being written and shards that are fetched."""
    gpu_resource: Key = "nvidia.com/gpu"
    """The cluster's name of the resource GPU."""
    resources: dict[Key, Quantity] = {}
    """Other resources of a worker pod: `{rdma/hca: "1"}`."""
    head: HeadPod = HeadPod()
    """The pod of Ray's head and of the driver."""
    claim: Name = "clm-dist"
    """PersistentVolumeClaim that all pods mount; runs, blocks and downloaded models lie on it."""
    mount: Directory = "/shared"
    """Directory where the claim is mounted; it holds `runs` and `store`."""
    store: str | None = None
    """Directory in the pods, or URL (s3://, gs://), of the prepared blocks; null is `store` on the claim."""
    secret: Name | None = None
    """Secret whose keys become environment variables of the pods: HF_TOKEN, AWS_SECRET_ACCESS_KEY, ..."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Environment variables of the pods. Everyone who may list pods can read them, so secrets go to `secret`."""
    user: Annotated[int, Field(ge=1, le=MOST)] | None = 1000
    """Numeric user that programs run as; null where the cluster sets one (OpenShift)."""
    group: Annotated[int, Field(ge=1, le=MOST)] | None = 1000
    """Its group, to which the claim is made writable; null as for `user`."""
    queue: Annotated[Name, Field(max_length=63)] | None = None
    """Queue of Kueue that admits the job as a whole; null leaves its pods to the cluster's scheduler, one by one."""
    priority_class: Name | None = None
    """Priority class of the pods."""
    node_selector: dict[Key, LabelValue] = {}
    """Labels of the nodes that worker pods run on."""
    tolerations: list[dict[str, JsonValue]] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    """Tolerations of worker pods with GPUs, as Kubernetes writes them."""
    max_retries: Annotated[int, Field(ge=0, le=MOST)] = 3
    """How often the run is tried again with new pods after a failure. A run that saved because its pods were ended is
    always continued."""
    grace_s: Annotated[int, Field(ge=60, le=86400)] = 120
    """Grace period of pods, in seconds; the run must save within it."""
    start_deadline_s: Count | None = 3600
    """Seconds after which an attempt of a RayJob fails unless all its pods have started; null is never. Jobs with a
    queue or with --plain have no deadline."""

    @model_validator(mode="before")
    @classmethod
    def _removed_keys_have_no_value(cls, values: Any) -> Any:
        return without_removed(values, "cluster.k8s", _REMOVED)

    @field_validator("env")
    @classmethod
    def _env_is_free_and_no_secret(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if name in ("POD_NAME", "POD_IP") or name.startswith(("CLM_DIST_", "RAY_AUTH_")):
                raise PydanticCustomError(
                    "env", f"the variable {name} is set by clm-dist, which relies on it; remove it"
                )
            if name.endswith(("_TOKEN", "_SECRET_ACCESS_KEY", "_API_KEY")):
                advice = "put it into a Secret, and set cluster.k8s.secret to the name of the Secret"
                raise PydanticCustomError(
                    "env", f"the variable {name} would be visible to everyone who may list pods; {advice}"
                )
        return env

    @model_validator(mode="after")
    def _tolerations_are_tolerations(self) -> Self:
        known = {"key", "operator", "value", "effect", "tolerationSeconds"}
        for toleration in self.tolerations:
            if unknown := set(toleration) - known:
                problem = f"{min(unknown)} is not a key of a toleration; the keys are {', '.join(sorted(known))}"
                raise wrong("cluster.k8s.tolerations", problem)
        return self


def shm_bytes(memory: str) -> int:
    """Size of /dev/shm of a pod, which is part of the pod's memory."""
    return min(num_bytes(memory) // 4, 16 * 2**30)


def store_bytes(memory: str) -> int:
    """Size of Ray's object store in a pod's /dev/shm; the rest is for NCCL."""
    return shm_bytes(memory) * 3 // 10
