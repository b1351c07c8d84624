"""The command `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.complete import complete_job
from clm_dist.cli.options import DEFAULT_RUNS, JOB_HELP, Overrides, Runs, StoreOption, open_stores
from clm_dist.cli.streams import unfailing
from clm_dist.config.load import load_job, located
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.files.stores import DEFAULT_STORES
from clm_dist.progress import out


def doctor(
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB", help=JOB_HELP, autocompletion=complete_job)] = None,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: StoreOption = DEFAULT_STORES,
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=5, max=3600, help="What takes longer is not checked, and said."
        ),
    ] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check in seconds whether a run would work: here, or on all nodes of this shell's Slurm job or Ray."""
    from clm_dist.doctor.examine import examine
    from clm_dist.doctor.show import report_json, show_report

    if overrides and job_file is None:
        raise ConfigError("--set goes with a job file; name one")
    runs_dir, kept = local_dir(runs, "--runs"), open_stores(stores)
    if job_file is None:
        report = examine(None, runs_dir, kept, time_s=timeout_s)
    else:
        job = load_job(job_file, overrides or ())
        with located(job):
            report = examine(job.config, runs_dir, kept, time_s=timeout_s)
    with unfailing("stdout"):
        if as_json:
            typer.echo(report_json(report))
        else:
            show_report(report, out)
    raise typer.Exit(report.exit_code)
