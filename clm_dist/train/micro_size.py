"""A pass that does not fit into memory: the next workers take half its blocks, which changes no global batch."""

from clm_dist.config.job import JobConfig
from clm_dist.config.load import fingerprint, read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.run_dir import RunDir


def with_blocks_that_fit(job: JobConfig, run: RunDir) -> JobConfig:
    """The job of a run, with the `batch.micro_size` that was found to be small enough, if there is one."""
    if not run.micro_size.exists():
        return job
    found = read_json(run.micro_size)
    if found["of"] != _of(job):
        # A person has changed what a pass needs since.
        return job
    return job.model_copy(update={"batch": job.batch.model_copy(update={"micro_size": found["fits"]})})


def halve_micro_size(run: RunDir) -> None:
    """Let the next workers of a run take half the blocks in a pass.

    Raises:
        ConfigError: a pass of one block does not fit.
    """
    job = read_saved_job(run.job)
    blocks = min(with_blocks_that_fit(job, run).batch.micro_size, job.batch.global_size)
    if blocks == 1:
        raise ConfigError(
            "batch.micro_size: a pass of one block does not fit into memory; set train.gradient_checkpointing: true or "
            "train.precision: bf16, spread the model with cluster.strategy zero2, zero3 or fsdp2, set cluster.offload, "
            "or lower data.block_size",
            field="batch.micro_size",
        )
    write_json(run.micro_size, {"of": _of(job), "fits": -(-blocks // 2)})


def _of(job: JobConfig) -> str:
    """A fingerprint of what decides how much memory a pass takes."""
    sections = ("batch", "train", "model", "cluster")
    return fingerprint(job.model_dump(mode="json", include={"data": {"block_size"}, **dict.fromkeys(sections, True)}))
