"""The blocks of a pass that a run has found: fewer where one did not fit into memory, or those of `auto`.

They change no global batch. They are kept with the run, because what dropout draws depends on them.
"""

from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.load import fingerprint, read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.run_dir import RunDir

_CLUSTER = ("workers", "strategy", "offload", "gpus_per_worker")
_TRAIN = ("precision", "gradient_checkpointing", "compile", "optimizer", "optimizer_options")


def with_blocks_that_fit(job: JobConfig, run: RunDir, device: str | None = None) -> JobConfig:
    """The job of a run, with the `batch.micro_size` that was found for it, if there is one.

    Args:
        device: on which the run goes on; what `auto` found on another is left. None takes it all the same.
    """
    found = _read(job, run)
    if "fits" not in found or (device is not None and found.get("device", device) != device):
        return job
    return job.with_micro_size(found["fits"])


def blocks_that_did_not_fit(job: JobConfig, run: RunDir) -> int | None:
    """The blocks of a pass that did not fit while `auto` was looked for; None where all did."""
    failed: int | None = _read(job, run).get("failed")
    return failed


def write_blocks_that_fit(job: JobConfig, run: RunDir, size: int, device: str) -> None:
    """Let the run have the blocks in a pass that were found for `auto`."""
    write_json(run.micro_size, {"of": _of(job), "fits": size, "device": device})


def halve_micro_size(run: RunDir, failed: int | None) -> None:
    """Let the next workers of a run take half the blocks in a pass.

    Args:
        failed: blocks of the pass, where they were a try for `auto`.

    Raises:
        ConfigError: a pass of one block does not fit.
    """
    job = read_saved_job(run.job)
    blocks = failed or min(with_blocks_that_fit(job, run).batch.known_micro_size, job.batch.global_size)
    if blocks == 1:
        raise ConfigError(
            "batch.micro_size: a pass of one block does not fit into memory; set train.gradient_checkpointing: true or "
            "train.precision: bf16, spread the model with cluster.strategy zero2, zero3 or fsdp2, set cluster.offload, "
            "or lower data.block_size",
            field="batch.micro_size",
        )
    write_json(run.micro_size, {"of": _of(job), **({"failed": failed} if failed else {"fits": -(-blocks // 2)})})


def _read(job: JobConfig, run: RunDir) -> dict[str, Any]:
    if not run.micro_size.exists():
        return {}
    found: dict[str, Any] = read_json(run.micro_size)
    # A person may have changed what a pass needs since.
    return found if found["of"] == _of(job) else {}


def _of(job: JobConfig) -> str:
    """A fingerprint of what decides how much memory a pass takes."""
    kept: Any = {"batch": True, "model": True, "cluster": set(_CLUSTER), "train": set(_TRAIN)}
    return fingerprint(job.model_dump(mode="json", include=kept | {"data": {"block_size", "document_mask"}}))
