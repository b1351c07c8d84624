"""Which run a job is, before anything heavy is loaded: new, begun, or done."""

import logging
import shutil
from pathlib import Path

from clm_dist.config.differences import differing_fields
from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, writing
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.final import find_damage
from clm_dist.files.run_dir import RunDir

logger = logging.getLogger(__name__)


def find_run(job: JobConfig, runs: Path, *, resume: bool = False, overwrite: bool = False) -> tuple[RunDir, bool]:
    """The job's run directory, and whether the run in it is done already. Changes nothing.

    A run whose final model is lost or damaged is not done: it goes on from its last checkpoint, which is of its last
    step, and only writes the model again.

    Raises:
        ConfigError: a run of this name exists with another job, and neither `resume` nor `overwrite` says what to do;
            or its final model is lost or damaged, and there is no checkpoint.
    """
    run = RunDir(runs / job.name)
    if overwrite:
        return run, False
    if not run.exists():
        if _committed(job, run):
            root = Checkpoints.of_run(job, run).root
            raise ConfigError(
                f"{root} has checkpoints, but {run.job} is missing, so which job they are of is not known; "
                "restore it, start again with --overwrite, or make another run with --set name=...",
                field="name",
            )
        return run, False
    saved = read_saved_job(run.job)
    if saved.checkpoint.path != job.checkpoint.path:
        raise ConfigError(
            f"the checkpoints of the run {run.root} lie in {Checkpoints.of_run(saved, run).root}, and the job has "
            f"checkpoint.path {job.checkpoint.path}: it would start from nothing. Set checkpoint.path to what it was "
            "(move the files and edit job.yaml to have them elsewhere), or start again with --overwrite",
            field="checkpoint.path",
        )
    different = differing_fields(saved, job)
    if different and not resume:
        shown = ", ".join(different[:6]) + (", ..." if len(different) > 6 else "")
        raise ConfigError(
            f"the run {run.root} exists with another job (different: {shown}); go on from its last checkpoint with "
            "--resume, start it again with --overwrite, or make another run with --set name=...",
            field="name",
        )
    done = run.result.exists() and read_json(run.result).get("status") == "done"
    if not done or different:
        return run, False
    if (damage := find_damage(run)) is None:
        return run, True
    if not _committed(job, run):
        raise ConfigError(
            f"{damage}, and the run has no checkpoint to write the model from; restore the files, or start again with "
            "--overwrite"
        )
    logger.warning("%s; the model is written again from the last checkpoint", damage)
    return run, False


def _committed(job: JobConfig, run: RunDir) -> list[str]:
    checkpoints = Checkpoints.of_run(job, run)
    with checkpoints.reaching():
        return checkpoints.committed()


def remove_run(job: JobConfig, run: RunDir) -> None:
    """Remove a run and its checkpoints. A plan stays: it is made before the run that comes."""
    checkpoints = Checkpoints.of_run(job, run)
    with checkpoints.reaching():
        checkpoints.remove_all()
    if not run.plan.exists():
        shutil.rmtree(run.root, ignore_errors=True)
        return
    with writing(run.root):
        for path in run.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path != run.plan:
                path.unlink(missing_ok=True)
