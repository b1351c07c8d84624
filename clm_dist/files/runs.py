"""Which run a job is, before anything heavy is loaded: new, begun, or done."""

import shutil
from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.config.load import differing_fields, read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir


def find_run(job: JobConfig, runs: Path, *, resume: bool = False, overwrite: bool = False) -> tuple[RunDir, bool]:
    """The job's run directory, and whether the run in it is done already. Writes nothing.

    Raises:
        ConfigError: a run of this name exists with another job, and neither `resume` nor `overwrite` says what to do.
    """
    run = RunDir(runs / job.name)
    if overwrite:
        return run, False
    if not run.exists():
        checkpoints = Checkpoints.of_run(job, run)
        with checkpoints.reaching():
            names = checkpoints.committed()
        if names:
            raise ConfigError(
                f"{checkpoints.root} has checkpoints, but {run.job} is missing, so which job they are of is not known; "
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
    return run, done and not different


def remove_run(job: JobConfig, run: RunDir) -> None:
    """Remove a run and its checkpoints."""
    checkpoints = Checkpoints.of_run(job, run)
    with checkpoints.reaching():
        checkpoints.remove_all()
    shutil.rmtree(run.root, ignore_errors=True)
