"""The content of result.json: built from a run's records, written once, read by reports."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Literal, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import damaged, read_json
from clm_dist.files.blocks import Manifest
from clm_dist.files.record_types import EvalRecord, FinalRecord, StartRecord
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import EvalFigures

Status = Literal["done", "preempted", "failed", "running"]


class Training(TypedDict):
    """Totals of training, over all attempts."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float | None


class Hardware(TypedDict):
    """Where the last attempt ran."""

    device: str | None
    machine: str
    cpus: int | None


class Result(TypedDict):
    """The content of result.json."""

    name: str
    status: Status
    """`running` only in the card of a model that is pushed before the end."""
    baseline: EvalFigures | None
    """The evaluation of the untouched model."""
    evals: list[EvalFigures]
    train_losses: NotRequired[list[float | None]]
    """For each of `evals` the mean training loss of a token since the one before; None where no step was trained."""
    final: EvalFigures | None
    """That of the model in `final`; None until the run is done."""
    keep: NotRequired[Literal["last", "best"]]
    """The value of `train.keep`."""
    stopped_early: NotRequired[bool]
    """Whether training ended before its last step, because the evaluations no longer got better."""
    train: Training
    workers: int
    """When the run ended."""
    strategy: str
    restarts: int
    data: str
    """Fingerprint of the blocks."""
    versions: dict[str, str]
    hardware: Hardware
    finished: str
    """ISO 8601, with the offset of its time zone."""
    files: NotRequired[dict[str, str]]
    """sha256 of each file of `final`, of a run that is done; see `final.hash_final`."""
    error: NotRequired[str]
    """Why the run failed."""


def read_result(path: Path) -> Result:
    """The result of a run directory. Raises ConfigError where there is none, or only a part of one."""
    run = RunDir(path)
    if not run.exists() and run.result.is_file():
        raise ConfigError(f"{run.job} is missing; restore it, or train again with --overwrite")
    if not run.result.is_file():
        reason = "has no result yet" if run.exists() else "is no run directory"
        if not run.exists() and run.plan.is_file():
            raise ConfigError(f"{path} has a plan, and its run has not begun; start it with `clm-dist run JOB`")
        raise ConfigError(f"{path} {reason}; name a directory that `clm-dist run` wrote, for example runs/quickstart")
    result: Result = read_json(run.result)
    try:
        # Further keys may come from a later version.
        TypeAdapter(Result).validate_python(result)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise damaged(run.result, f"{where}: {problem['msg']}" if where else problem["msg"]) from None
    return result


def last_figures(result: Result) -> EvalFigures | None:
    """The final evaluation, or the last one of a run that is not done."""
    return result["final"] or (result["evals"][-1] if result["evals"] else None)


def build_result(
    job: JobConfig,
    run: RunDir,
    manifest: Manifest,
    status: Status,
    error: str | None = None,
    files: dict[str, str] | None = None,
) -> Result:
    """The content of result.json, from the run's metrics."""
    starts: list[StartRecord] = []
    evals: list[EvalFigures] = []
    ends: list[FinalRecord] = []
    train_losses: list[float | None] = []
    last_step = tokens = tokens_since = 0
    seconds = loss_since = 0.0
    for record in read_records(run.metrics):
        if record["kind"] == "step":
            last_step = record["step"]
            tokens += record["tokens"]
            tokens_since += record["tokens"]
            loss_since += record["tokens"] * record["loss"]
            seconds += record["seconds"]
        elif record["kind"] == "start":
            starts.append(record)
        elif record["kind"] == "eval":
            evals.append(_figures(record))
            if record["step"] > 0:
                train_losses.append(loss_since / tokens_since if tokens_since else None)
                tokens_since, loss_since = 0, 0.0
        elif record["kind"] == "final":
            ends.append(record)
    end = ends[-1] if ends and status == "done" else None
    result: Result = {
        "name": job.name,
        "status": status,
        "baseline": evals[0] if evals and evals[0]["step"] == 0 else None,
        "evals": [e for e in evals if e["step"] > 0],
        "train_losses": train_losses,
        "final": next(e for e in reversed(evals) if e["step"] == end["kept"]) if end else None,
        "keep": job.train.keep,
        "stopped_early": end is not None and end["stopped_early"],
        "train": {
            "steps": last_step,
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
    if files is not None:
        result["files"] = files
    if error is not None:
        result["error"] = error
    return result


def _figures(record: EvalRecord) -> EvalFigures:
    return {
        "step": record["step"],
        "epoch": record["epoch"],
        "loss": record["loss"],
        "perplexity": record["perplexity"],
        "bits_per_byte": record["bits_per_byte"],
        "num_tokens": record["num_tokens"],
    }


def _versions() -> dict[str, str]:
    names = ("clm-dist", "torch", "transformers", "accelerate", "deepspeed", "ray", "datasets", "tokenizers")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    # Of a working tree that went before the installed package, see `submit k8s --sync`.
    return versions | ({"commit": commit} if (commit := os.environ.get("CLM_DIST_COMMIT")) else {})
