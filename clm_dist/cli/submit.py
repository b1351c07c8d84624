"""The command `submit`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.cluster import DryRun, PlanOn, settings_of, submit_to
from clm_dist.cli.options import (
    DEFAULT_RUNS,
    JobFile,
    Overrides,
    Overwrite,
    Resume,
    Runs,
    StoreOption,
    open_stores,
)
from clm_dist.cli.plan import plan_for_hosts
from clm_dist.cli.submit_k8s import k8s
from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job, located
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.files.stores import DEFAULT_STORES
from clm_dist.submit.slurm.backend import Launch, SlurmBackend
from clm_dist.submit.slurm.render import Request
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
    gpus_per_node: Annotated[
        str | None, typer.Option("--gpus-per-node", metavar="[TYPE:]COUNT", help="GPUs of each host.")
    ] = None,
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
        int | None,
        typer.Option("--at-once", min=1, help="With --array: how many of its runs may run at the same time."),
    ] = None,
    prepare_first: Annotated[
        bool, typer.Option("--prepare-first", help="Prepare in a job of its own, on CPUs, before this one.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plan: PlanOn = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a job to Slurm: prepare, train, evaluate and report on its hosts."""
    given = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "time": limit,
        "partition": partition,
        "account": account,
    }
    settings = [*(overrides or ()), *settings_of("cluster.slurm", given), *map(_option_setting, options or ())]
    if at_once and not array:
        raise ConfigError("--at-once is only for --array; remove it")
    job = load_job(job_file, settings)
    name = job.config.name
    jobs = _sweep(job_file, settings, array, name) if array else [job.config]
    submission = Submission(
        name=name,
        backend="slurm",
        runs=_plain(local_dir(runs, "--runs")),
        run_names=tuple(config.name for config in jobs),
        sweep=bool(array),
    )
    request = Request(submission, store=str(open_stores(stores)), venv=Path(sys.prefix), resume=resume, at_once=at_once)
    launch = Launch(jobs, request, prepare_first=prepare_first, overwrite=overwrite)
    if plan is not None:
        hosts = job.config.cluster.slurm
        with located(job):
            plans = plan_for_hosts(jobs, open_stores(stores), plan, nodes=hosts.nodes, gpus_per_node=hosts.num_gpus)
        launch = replace(launch, plans=plans)
    submit_to(SlurmBackend(), launch, job, dry_run=dry_run)


def _sweep(job_file: Path, settings: Sequence[str], array: Sequence[str], name: str) -> list[JobConfig]:
    """The job of each run of a sweep. `name` is the name of the sweep."""
    jobs: dict[str, JobConfig] = {}
    for sweep in sweep_settings(array):
        run = sweep_name(name, sweep)
        if run in jobs:
            raise ConfigError(f"--array: two of its runs would be named {run}; give values that differ")
        jobs[run] = load_job(job_file, [*settings, *sweep, f"name={run}"]).config
    return list(jobs.values())


def _option_setting(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"cluster.slurm.options={json.dumps({name: value if equals else True})}"


def _plain(runs: Path) -> Path:
    """The directory, if sbatch can write a log to it. Raises ConfigError otherwise."""
    if "\\" in str(runs) or any(ord(character) < 32 for character in str(runs)):
        problem = f"--runs {str(runs)!r} has a backslash or a line break, and Slurm cannot write a log to such a path"
        raise ConfigError(f"{problem}; name another")
    return runs
