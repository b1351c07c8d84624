"""The command `submit`."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.options import (
    DEFAULT_RUNS,
    DEFAULT_STORES,
    JobFile,
    Overrides,
    Overwrite,
    Resume,
    Runs,
    StoreOption,
    located,
    open_stores,
)
from clm_dist.cli.submit_k8s import k8s
from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.progress import err, out
from clm_dist.submit import launch
from clm_dist.submit.slurm.render import Request, hosts_of, render_prepare, render_run
from clm_dist.submit.submission import Submission, sweep_name, sweep_settings

submit = typer.Typer(no_args_is_help=True, help="Submit a job to a cluster.")
submit.command()(k8s)


@submit.command()
def slurm(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: StoreOption = DEFAULT_STORES,
    nodes: Annotated[int | None, typer.Option("--nodes", help="Hosts.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", help="GPUs of each host.")] = None,
    limit: Annotated[str | None, typer.Option("--time", help="Time limit, as Slurm writes it: 2:00:00.")] = None,
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    account: Annotated[str | None, typer.Option("--account")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Any other option of sbatch, without dashes; repeatable."),
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option("--array", metavar="FIELD=V1,V2,...", help="A run for each value of a field, as one job array."),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="With --array: so many of its runs at the same time.")
    ] = None,
    prepare_first: Annotated[
        bool, typer.Option("--prepare-first", help="Prepare in a job of its own, on CPUs, before this one.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Submit a job to Slurm: prepare, train, evaluate and report on its hosts."""
    given = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "time": limit,
        "partition": partition,
        "account": account,
    }
    settings = [f"cluster.slurm.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings += [_option_setting(option) for option in options or ()]
    settings = [*(overrides or ()), *settings]
    if at_once and not array:
        raise ConfigError("--at-once goes with --array; leave it out")
    job = load_job(job_file, settings)
    configs = _sweep(job_file, settings, array, job.config.name) if array else [job.config]
    submission = Submission(
        name=job.config.name,
        backend="slurm",
        runs=_plain(local_dir(runs, "--runs")),
        run_names=tuple(config.name for config in configs),
        sweep=bool(array),
    )
    request = Request(submission, store=str(open_stores(stores)), venv=Path(sys.prefix), resume=resume, at_once=at_once)
    with located(job):
        for config in configs:
            hosts_of(config.cluster).check()
        if len({render_run(config, request) for config in configs}) > 1:
            raise ConfigError("--array: its runs ask Slurm for different things; submit them one by one")
        if dry_run:
            if prepare_first:
                typer.echo(render_prepare(configs[0], request))
            typer.echo(render_run(configs[0], request), nl=False)
            return
        launch.check_submission(configs, request, prepare_first=prepare_first, overwrite=overwrite)
    for warning in _warnings(job.config, request):
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    submitted = launch.submit(configs, request, prepare_first=prepare_first, overwrite=overwrite)
    first = f" after job {submitted.prepare_id}, which prepares" if submitted.prepare_id else ""
    out.print(f"submitted {submitted.name} as job {submitted.job_id}{first}", soft_wrap=True)
    out.print(
        f"clm-dist status {submitted.name} · clm-dist logs -f {submitted.name} · clm-dist cancel {submitted.name}"
    )


def _sweep(job_file: Path, settings: Sequence[str], array: Sequence[str], name: str) -> list[JobConfig]:
    """The job of each run of a sweep; `name` is that of the whole."""
    jobs: dict[str, JobConfig] = {}
    for sweep in sweep_settings(array):
        run = sweep_name(name, sweep)
        if run in jobs:
            raise ConfigError(f"--array: two of its runs would be {run}; give values that tell them apart")
        jobs[run] = load_job(job_file, [*settings, *sweep, f"name={run}"]).config
    return list(jobs.values())


def _option_setting(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"cluster.slurm.options={json.dumps({name: value if equals else True})}"


def _plain(runs: Path) -> Path:
    """A directory that sbatch can write a log to. Raises ConfigError where its path cannot be said to it."""
    if "\\" in str(runs) or any(ord(character) < 32 for character in str(runs)):
        problem = f"--runs {str(runs)!r} has a backslash or a line break, and Slurm writes no log to such a path"
        raise ConfigError(f"{problem}; name another")
    return runs


def _warnings(job: JobConfig, request: Request) -> Iterator[str]:
    for place in launch.local_places(request):
        yield (
            f"{place} looks like a disk of this host alone; every node must see it. Name one on shared storage with "
            "--runs and --store, or CLM_DIST_RUNS and CLM_DIST_STORE"
        )
    yield from hosts_of(job.cluster).warnings()
