"""Environment variables that override or disturb a job. Each was tried, or read in the code that takes it."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clm_dist.doctor.finding import Finding, error, note, ok, warning
from clm_dist.doctor.need import Need

_NAMES = (
    *("RAY_ADDRESS", "RAY_TRAIN_V2_ENABLED", "RAY_grpc_enable_http_proxy", "CLM_DIST_NODES", "RAY_TMPDIR", "TMPDIR"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME"),
    *("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS"),
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "TORCH_DISTRIBUTED_DEBUG"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
_PREFIXES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "NCCL_", "GLOO_")
_TRUE = ("1", "true", "yes", "on")
_SLOWS = {
    "NCCL_P2P_DISABLE": "GPUs of a node do not write into each other's memory",
    "NCCL_SHM_DISABLE": "processes of a node do not use shared memory",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "CUDA_LAUNCH_BLOCKING": "the processor waits for each kernel of a GPU",
}


_WITH_PASSWORDS = ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint")


@dataclass(frozen=True)
class Surroundings:
    """From where a process looks at its environment."""

    joins: bool
    """Whether a run uses a Ray that is there already, or that a Slurm job starts, and not one of its own."""
    has_gpus: bool


def read_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that are judged, without passwords in the addresses of proxies."""
    return {
        name: re.sub(r"^(\w+://)?.*@", r"\1", value) if name.lower() in _WITH_PASSWORDS else value
        for name, value in environment.items()
        if name in _NAMES or name.startswith(_PREFIXES)
    }


def is_offline(variables: Mapping[str, str], *, of_data: bool = False) -> bool:
    """Whether the clients of the Hub use their copies alone, as they read the environment.

    Args:
        of_data: the one of data sets, which has a variable of its own.
    """
    own = variables.get("HF_DATASETS_OFFLINE") if of_data else None
    value = own or variables.get("HF_HUB_OFFLINE") or variables.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in _TRUE


def judge_environment(variables: Mapping[str, str], need: Need, where: Surroundings) -> Iterator[Finding]:
    """The findings of one node."""
    findings = [
        *_judge_ray(variables, where),
        *_judge_hub(variables, need),
        *_judge_libraries(variables, where),
        *_judge_allocation(variables),
    ]
    yield from findings
    if not findings:
        yield ok("environment", "no variable that overrides or disturbs a job")


def _judge_ray(variables: Mapping[str, str], where: Surroundings) -> Iterator[Finding]:
    if variables.get("RAY_TRAIN_V2_ENABLED", "1").lower() not in ("1", "true"):
        yield error(
            "environment",
            f"RAY_TRAIN_V2_ENABLED={variables['RAY_TRAIN_V2_ENABLED']} turns off the Ray Train that clm-dist uses",
            "every run ends when it imports Ray",
            "unset RAY_TRAIN_V2_ENABLED",
        )
    if variables.get("RAY_grpc_enable_http_proxy", "0").lower() in ("1", "true") and _proxies(variables):
        yield warning(
            "environment",
            "RAY_grpc_enable_http_proxy is set, and there is a proxy: Ray's own connections go through it, but for "
            f"those to no_proxy ({variables.get('no_proxy') or 'which is empty'})",
            "a proxy for the outside does not know the hosts of a cluster, and the start of Ray waits for ever",
            "unset RAY_grpc_enable_http_proxy, or name 127.0.0.1 and the hosts in no_proxy",
        )
    if (count := variables.get("CLM_DIST_NODES")) is not None and not count.isdigit():
        yield error(
            "environment",
            f"CLM_DIST_NODES={count} is not a number",
            "scripts of clm-dist set it to the number of nodes that a run waits for, and a run ends where it reads it",
            "unset CLM_DIST_NODES",
        )
    for name in ("TMPDIR", "RAY_TMPDIR"):
        if (path := variables.get(name)) and not Path(path).is_dir() and not where.joins:
            yield warning(
                "environment",
                f"{name}={path} is not a directory",
                "temporary files and those of Ray go to /tmp instead",
                f"make the directory, or set {name} to another",
            )


def _judge_hub(variables: Mapping[str, str], need: Need) -> Iterator[Finding]:
    if endpoint := variables.get("HF_ENDPOINT"):
        yield note("environment", f"HF_ENDPOINT={endpoint}", "models, data and pushes go to that Hub")
    if is_offline(variables) and need.pushes:
        yield warning(
            "environment",
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, and hub.push is not never",
            "nothing is pushed: the push stays pending, and `clm-dist push RUN` completes it",
            "unset the variable, or set hub.push to never",
        )
    proxies = _proxies(variables)
    if proxies and (need.models or need.dataset or need.pushes):
        yield note(
            "environment",
            "; ".join(f"{name}={value}" for name, value in proxies.items()),
            "the clients of the Hub go through this proxy",
        )


def _proxies(variables: Mapping[str, str]) -> dict[str, str]:
    names = ("http_proxy", "https_proxy", "all_proxy")
    return {name: value for name, value in variables.items() if name.lower() in names and value}


def _judge_libraries(variables: Mapping[str, str], where: Surroundings) -> Iterator[Finding]:
    if ignored := sorted(name for name in variables if name.startswith(_PREFIXES[:3])):
        yield note(
            "environment",
            f"{', '.join(ignored[:4])}{', ...' if len(ignored) > 4 else ''}: no effect",
            "workers remove what `accelerate config` left; the job file alone decides",
        )
    for name, effect in _SLOWS.items():
        if where.has_gpus and variables.get(name, "0").lower() in _TRUE:
            yield warning("environment", f"{name}={variables[name]}: {effect}", "training is slower", f"unset {name}")
    if where.has_gpus and variables.get("DS_ACCELERATOR", "cuda") != "cuda":
        yield warning(
            "environment",
            f"DS_ACCELERATOR={variables['DS_ACCELERATOR']}, and there are GPUs",
            "DeepSpeed (zero1, zero2, zero3) uses that device, not the GPU of the worker, and fails",
            "unset DS_ACCELERATOR",
        )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        if where.has_gpus and name in variables:
            yield note(
                "environment",
                f"{name}={variables[name]}",
                "workers take it as it is: it changes how torch uses the memory of a GPU",
            )
    # Ray sets it in its own processes.
    if variables.get("OMP_NUM_THREADS", "").isdigit() and not where.joins:
        yield note(
            "environment",
            f"OMP_NUM_THREADS={variables['OMP_NUM_THREADS']}",
            "`evaluate` and `generate` compute with as many threads; workers take cluster.cpus_per_worker",
        )


def _judge_allocation(variables: Mapping[str, str]) -> Iterator[Finding]:
    nodes = variables.get("SLURM_JOB_NUM_NODES", "1")
    if nodes.isdigit() and int(nodes) > 1 and "RAY_ADDRESS" not in variables:
        yield warning(
            "environment",
            f"this shell is in Slurm's job {variables.get('SLURM_JOB_ID', '?')} of {nodes} nodes, and RAY_ADDRESS is "
            "not set",
            "`clm-dist run` here uses this node alone",
            "clm-dist submit slurm JOB, which starts Ray on all nodes of a job",
        )
