"""Checkpoints of a run: which are committed, which is the last, and what they say of themselves.

A checkpoint is a directory to which every rank adds its share. It counts once `committed.json` is in it, which the
driver writes when every rank's share is there; what has no such file is never resumed from.
"""

import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_dist.config import JobConfig
from clm_dist.errors import CheckpointError, ConfigError
from clm_dist.run_dir import read_json, write_json

FORMAT_VERSION = 1
_MARKER = "committed.json"
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint was taken from; its weights and optimizer lie beside it."""

    step: int
    world_size: int
    strategy: str
    fingerprint: str
    """Of the blocks that it was trained on."""
    global_size: int
    seed: int
    """With the batch size it says which blocks the next step takes."""
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        write_json(directory / _STATE, asdict(self))


def checkpoint_name(step: int) -> str:
    """A name that was never used: a killed save may have left a part of this step behind."""
    return f"step-{step:08d}-{secrets.token_hex(4)}"


def commit(checkpoints: Path, name: str, keep: int) -> None:
    """Mark a checkpoint as complete, and remove the older ones that are not kept."""
    write_json(checkpoints / name / _MARKER, {"format_version": FORMAT_VERSION})
    for directory in committed(checkpoints)[:-keep]:
        # Without its marker a directory that is half removed is nothing, rather than broken.
        (directory / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def committed(checkpoints: Path) -> list[Path]:
    """Directories of the committed checkpoints, the oldest first."""
    return sorted(marker.parent for marker in checkpoints.glob(f"step-*/{_MARKER}"))


def is_committed(directory: Path) -> bool:
    return (directory / _MARKER).exists()


def remove_uncommitted(checkpoints: Path) -> None:
    """Clear what killed saves left behind. Only while no worker saves."""
    for directory in checkpoints.glob("step-*"):
        if not is_committed(directory):
            shutil.rmtree(directory, ignore_errors=True)


def read_state(directory: Path, job: JobConfig, world_size: int, fingerprint: str) -> TrainerState:
    """A checkpoint's state. Raises CheckpointError where this job cannot go on from it."""
    try:
        state = TrainerState(**read_json(directory / _STATE))
    except (OSError, ConfigError, TypeError) as error:
        raise CheckpointError(f"{directory} is no checkpoint that this version reads: {error}") from None
    again = "or start again with --overwrite or another name"
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format {state.format_version}, this version of clm-dist reads {FORMAT_VERSION}; "
            f"resume with the version that wrote it, {again}"
        )
    if state.strategy != job.cluster.strategy:
        raise CheckpointError(
            f"{directory} was saved with cluster.strategy {state.strategy}, the job has {job.cluster.strategy}; resume "
            f"with --set cluster.strategy={state.strategy}, {again}"
        )
    for field, saved, now in (
        ("batch.global_size", state.global_size, job.batch.global_size),
        ("train.seed", state.seed, job.train.seed),
    ):
        if saved != now:
            raise CheckpointError(
                f"{directory} was saved with {field} {saved}, the job has {now}: after {state.step} steps it would go "
                f"on with other blocks than those it has not seen; resume with --set {field}={saved}, {again}"
            )
    if state.world_size != world_size and state.strategy.startswith("zero"):
        raise CheckpointError(
            f"{directory} was saved by {state.world_size} workers, and {state.strategy} cannot resume with "
            f"{world_size} yet; resume with --set cluster.workers={state.world_size}, {again}"
        )
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{directory} was trained on the blocks {state.fingerprint}, the job's are {fingerprint}: the data or the "
            "tokenizer changed since; restore them (a Hub data set: --resume --set data.revision=COMMIT, which is in "
            f"the manifest.json of those blocks), {again}"
        )
    return state
