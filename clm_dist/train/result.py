"""How a run ended: the written model accepted, and the content of result.json."""

import importlib.metadata
import os
import platform
import time
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.run_dir import RunDir, read_records, replace_dir
from clm_dist.shards import Manifest

# Reading the model back runs the same arithmetic on the same weights; sharding adds rounding.
_VERIFY_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}


def accept_export(job: JobConfig, run: RunDir) -> None:
    """Put the written model into place as `final`, once its loss is known to be that of the trained model.

    Raises:
        RunError: the losses differ; the model stays where it was written.
    """
    records = read_records(run.metrics)
    trained = [r for r in records if r["kind"] == "eval"][-1]["loss"]
    written = [r for r in records if r["kind"] == "verify"][-1]["loss"]
    unverified = run.root / "final.unverified"
    tolerance = _VERIFY_TOLERANCE[job.train.precision]
    if not abs(written - trained) <= tolerance * abs(trained):
        raise RunError(
            f"the written model evaluates to a loss of {written:.6f}, the trained one to {trained:.6f}; it is left in "
            f"{unverified}, and the checkpoints are whole. This is a fault of clm-dist: please report it"
        )
    replace_dir(unverified, run.final)


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
