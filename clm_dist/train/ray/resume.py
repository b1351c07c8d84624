"""The checkpoint that a run goes on from, looked at by the driver before workers are started."""

import contextlib

from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import DamagedError, TrainerState, checkpoint_of
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir


def check_best(job: JobConfig, run: RunDir, checkpoints: Checkpoints, state: TrainerState) -> None:
    """Raise CheckpointError where the best evaluation until a checkpoint is not known, or its weights are not there."""
    keeps_best = job.train.keep == "best"
    again = "or start again with --overwrite or another name"
    if state.best is None and (keeps_best or job.train.stop_after):
        records = read_records(run.metrics, last_steps=0)
        if any(record["kind"] == "eval" and 0 < record["step"] <= state.step for record in records):
            raise CheckpointError(
                f"the checkpoint of step {state.step} is of an earlier version of clm-dist, which did not note the "
                "best evaluation for train.keep and train.stop_after; go on with --resume --set train.keep=last "
                f"--set train.stop_after=null, {again}"
            )
    if keeps_best and state.best and checkpoint_of(state.best, checkpoints.readable()) is None:
        raise CheckpointError(
            f"train.keep is best, but the checkpoint of the best evaluation until now, of step {state.best.step}, is "
            f"not in {checkpoints.root}: train.keep was last then, or it is lost; go on with --resume "
            f"--set train.keep=last, {again}"
        )


def newest_state(checkpoints: Checkpoints) -> tuple[str, TrainerState] | None:
    """The newest checkpoint whose marker is whole, and its state."""
    for name in reversed(checkpoints.committed()):
        with contextlib.suppress(DamagedError):
            return checkpoints.where(name), checkpoints.read(name).state
    return None
