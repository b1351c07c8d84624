"""What a shell proposes for arguments: jobs, runs and submissions. Where none fits, shells propose files."""

import os
from pathlib import Path

import typer

from clm_dist.config.packaged import packaged_jobs
from clm_dist.submit.submission import submitted_dir

DEFAULT_RUNS = "runs"


def complete_job(incomplete: str) -> list[str]:
    """Packaged jobs and the job files of this directory."""
    return _beginning(incomplete, [*packaged_jobs(), *(str(file) for file in Path().glob("*.yaml"))])


def complete_run(incomplete: str) -> list[str]:
    """Run directories, where a command has no `--runs`."""
    runs = Path(os.environ.get("CLM_DIST_RUNS") or DEFAULT_RUNS).expanduser()
    return _beginning(incomplete, [str(job.parent) for job in runs.glob("*/job.yaml")])


def complete_submission(context: typer.Context, incomplete: str) -> list[str]:
    """Names of submissions with the directory of runs of the command line."""
    runs = Path(context.params.get("runs") or DEFAULT_RUNS).expanduser()
    return _beginning(incomplete, [file.parent.name for file in submitted_dir(runs, "").glob("*/submission.json")])


def complete_submission_or_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names of submissions and of runs with the directory of runs of the command line."""
    runs = Path(context.params.get("runs") or DEFAULT_RUNS).expanduser()
    names = [job.parent.name for job in runs.glob("*/job.yaml")]
    return sorted({*complete_submission(context, incomplete), *_beginning(incomplete, names)})


def _beginning(incomplete: str, names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
