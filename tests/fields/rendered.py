"""Fields that a script for Slurm or objects of Kubernetes show: the change of each, and the text that it adds."""

import json

from clm_dist.submit.k8s.render import objects
from clm_dist.submit.k8s.request import Request
from clm_dist.submit.slurm.render import render_prepare, render_run
from tests.submit.test_k8s import job_of
from tests.support.fakes import full_job, request_of, submission

SLURM: dict[str, tuple[str, str]] = {
    "account": ("account=me", "#SBATCH --account=me\n"),
    "container.image": ("container={image: other.sqsh}", "--container-image=other.sqsh"),
    "container.mounts": ("container={image: a.sqsh, mounts: [/data]}", "/data:/data"),
    "container.runtime": ("container={image: a.sif, runtime: apptainer}", "apptainer exec"),
    "cpus_per_node": ("cpus_per_node=40", "#SBATCH --cpus-per-task=40\n"),
    "gpus_per_node": ("gpus_per_node=9", "#SBATCH --gpus-per-node=9\n"),
    "interface": ("interface=ib0", "addr show dev ib0"),
    "max_requeues": ("max_requeues=7", "\nmax_requeues=7\n"),
    "nodes": ("nodes=3", "#SBATCH --nodes=3\n"),
    "options": ("options={qos: high}", "#SBATCH --qos=high\n"),
    "partition": ("partition=large", "#SBATCH --partition=large\n"),
    "prepare.account": ("prepare.account=we", "#SBATCH --account=we\n"),
    "prepare.cpus": ("prepare.cpus=6", "prepare --tasks 6 "),
    "prepare.options": ("prepare.options={mem: 8G}", "#SBATCH --mem=8G\n"),
    "prepare.partition": ("prepare.partition=cpu", "#SBATCH --partition=cpu\n"),
    "prepare.time": ("prepare.time='0:30:00'", "#SBATCH --time=0:30:00\n"),
    "setup": ("setup='export A=1'", "\nexport A=1\n"),
    "signal_s": ("signal_s=300", "#SBATCH --signal=B:USR1@300\n"),
    "time": ("time='1:00:00'", "#SBATCH --time=1:00:00\n"),
    "venv": ("venv=/opt/models", "/opt/models/bin:$PATH"),
}
"""By the field of `cluster.slurm`."""
K8S: dict[str, tuple[str, str]] = {
    "claim": ("claim=other-claim", '{"claimName": "other-claim"}'),
    "cpus_per_pod": ("cpus_per_pod=61", '"cpu": "61"'),
    "env": ("env={NCCL_DEBUG: INFO}", '{"name": "NCCL_DEBUG", "value": "INFO"}'),
    "gpu_resource": ("gpu_resource=amd.com/gpu", '"amd.com/gpu": '),
    "gpus_per_pod": ("gpus_per_pod=9", '"nvidia.com/gpu": "9"'),
    "grace_s": ("grace_s=345", '"terminationGracePeriodSeconds": 345'),
    "group": ("group=2345", '"fsGroup": 2345'),
    "head.cpus": ("head.cpus=3", '"cpu": "3"'),
    "head.memory": ("head.memory=13Gi", '"memory": "13Gi"'),
    "image": ("image=registry.example/other:1", '"image": "registry.example/other:1"'),
    "max_retries": ("max_retries=7", '"backoffLimit": 7'),
    "memory_per_pod": ("memory_per_pod=77Gi", '"memory": "77Gi"'),
    "mount": ("mount=/elsewhere", '"mountPath": "/elsewhere"'),
    "namespace": ("namespace=models", '"namespace": "models"'),
    "node_selector": ("node_selector={pool: a100}", '"nodeSelector": {"pool": "a100"}'),
    "pods": ("pods=4", '"replicas": 4'),
    "priority_class": ("priority_class=high", '"priorityClassName": "high"'),
    "pull_secret": ("pull_secret=registry", '"imagePullSecrets": [{"name": "registry"}]'),
    "queue": ("queue=mine", '"kueue.x-k8s.io/queue-name": "mine"'),
    "resources": ("resources={rdma/hca: '1'}", '"rdma/hca": "1"'),
    "scratch": ("scratch=33Gi", '{"sizeLimit": "33Gi"}'),
    "secret": ("secret=tokens", '"envFrom": [{"secretRef": {"name": "tokens"}}]'),
    "start_deadline_s": ("start_deadline_s=777", '"preRunningDeadlineSeconds": 777'),
    "store": ("store=s3://bucket/store", '{"name": "CLM_DIST_STORE", "value": "s3://bucket/store"}'),
    "tolerations": ("tolerations=[{key: mine}]", '"tolerations": [{"key": "mine"}]'),
    "user": ("user=3456", '"runAsUser": 3456'),
}
"""By the field of `cluster.k8s`."""


def check_slurm(field: str) -> None:
    """Fail unless the scripts say what the field says, and only then."""
    setting, text = SLURM[field]
    assert text in _scripts(f"cluster.slurm.{setting}")
    assert text not in _scripts()


def check_k8s(field: str) -> None:
    """Fail unless the objects say what the field says, and only then."""
    setting, text = K8S[field]
    assert text in _objects(f"cluster.k8s.{setting}")
    assert text not in _objects()


def _scripts(*settings: str) -> str:
    job, request = full_job(*settings), request_of(submission())
    return f"{render_run(job, request)}\n{render_prepare(job, request)}"


def _objects(*settings: str) -> str:
    # The job file itself travels in the ConfigMap, whether its fields are heeded or not.
    return json.dumps([one for one in objects(job_of("eli5-full", *settings), Request()) if one["kind"] != "ConfigMap"])
