"""The content of result.json: built from a run's records, written once, read by reports."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import damaged, read_json
from clm_dist.files.blocks import Manifest
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir

Result = dict[str, Any]


class _Evaluation(BaseModel):
    step: int
    epoch: float
    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    num_tokens: int


class _Training(BaseModel):
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float | None


class _Hardware(BaseModel):
    device: str | None
    machine: str
    cpus: int | None


class _Result(BaseModel):
    """What result.json must have for a report; more is fine."""

    name: str
    status: str
    baseline: _Evaluation | None
    evals: list[_Evaluation]
    final: _Evaluation | None
    train: _Training
    workers: int
    strategy: str
    restarts: int
    data: str
    versions: dict[str, str]
    hardware: _Hardware
    finished: str


def read_result(path: Path) -> Result:
    """The result of a run directory. Raises ConfigError where there is none, or only a part of one."""
    run = RunDir(path)
    if not run.exists() and run.result.is_file():
        raise ConfigError(f"{run.job} is missing; restore it, or train again with --overwrite")
    if not run.result.is_file():
        reason = "has no result yet" if run.exists() else "is no run directory"
        raise ConfigError(f"{path} {reason}; name a directory that `clm-dist run` wrote, for example runs/quickstart")
    result: Result = read_json(run.result)
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise damaged(run.result, f"{where}: {problem['msg']}" if where else problem["msg"]) from None
    return result


def build_result(
    job: JobConfig, run: RunDir, manifest: Manifest, status: str, error: str | None = None
) -> dict[str, Any]:
    """The content of result.json, from the run's metrics."""
    records = read_records(run.metrics)
    steps = [r for r in records if r["kind"] == "step"]
    starts = [r for r in records if r["kind"] == "start"]
    evals = [{k: v for k, v in r.items() if k != "kind"} for r in records if r["kind"] == "eval"]
    seconds = sum(r["seconds"] for r in steps)
    tokens = sum(r["tokens"] for r in steps)
    result = {
        "name": job.name,
        "status": status,
        "baseline": evals[0] if evals and evals[0]["step"] == 0 else None,
        "evals": [e for e in evals if e["step"] > 0],
        "final": evals[-1] if evals and status == "done" else None,
        "train": {
            "steps": steps[-1]["step"] if steps else 0,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds if seconds else None,
        },
        # Elastic workers are as many as there were when it ended.
        "workers": starts[-1]["workers"] if starts else job.cluster.max_workers,
        "strategy": job.cluster.strategy,
        "restarts": max(0, len(starts) - 1),
        "data": manifest.fingerprint,
        "versions": _versions(),
        "hardware": {
            "device": starts[-1]["device"] if starts else None,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return result if error is None else result | {"error": error}


def _versions() -> dict[str, str]:
    names = ("clm-dist", "torch", "transformers", "accelerate", "deepspeed", "ray", "datasets", "tokenizers")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    # Of a working tree that went before the installed package, see `submit k8s --sync`.
    return versions | ({"commit": commit} if (commit := os.environ.get("CLM_DIST_COMMIT")) else {})
