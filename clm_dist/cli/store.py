"""The command `prepare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from clm_dist.cli.complete import complete_job
from clm_dist.cli.options import (
    JOB_HELP,
    Overrides,
    StoreOption,
    is_given,
    open_stores,
)
from clm_dist.cli.run import EX_INTERRUPTED
from clm_dist.cli.streams import unfailing
from clm_dist.config.load import load_job, located
from clm_dist.errors import ConfigError
from clm_dist.files.stores import DEFAULT_STORES, Store, Stores
from clm_dist.progress import err, open_progress, out


def prepare(
    context: typer.Context,
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB", help=JOB_HELP, autocompletion=complete_job)] = None,
    overrides: Overrides = None,
    stores: StoreOption = DEFAULT_STORES,
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, help="Partitions at once.", show_default="as many as CPUs")
    ] = None,
    partition_mib: Annotated[
        float,
        typer.Option(
            "--partition-mib", min=0.001, max=1024, help="Size of a partition; a task holds a few times that."
        ),
    ] = 16,
    show: Annotated[
        int | None, typer.Option("--show", min=0, help="Print figures of the tokens, and so many blocks.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option("--verify", metavar="STORE", help="Check every hash and count of a store.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="List the stores, and those to remove.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="With --prune: not asked for since.")
    ] = 0,
    larger_than: Annotated[
        float, typer.Option("--larger-than", metavar="MB", min=0, help="With --prune: of that size and more.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: remove them.")] = False,
) -> None:
    """Turn the job's text into blocks, once; look at them, check them, remove old ones."""
    if sum([job_file is not None, verify is not None, prune]) != 1:
        raise ConfigError("give a job file, or --verify STORE, or --prune; `clm-dist prepare --help` says more")
    for owner, is_there, names in (
        ("--prune", prune, ("older_than", "larger_than", "yes")),
        ("a job file", job_file is not None, ("overrides", "tasks", "partition_mib", "show")),
    ):
        if not is_there and (wrong := [name for name in names if is_given(context, name)]):
            option = "--set" if wrong[0] == "overrides" else f"--{wrong[0].replace('_', '-')}"
            raise ConfigError(f"{option} goes with {owner}; leave it out")
    if verify is not None:
        _verify(verify)
        return
    if prune:
        _prune(open_stores(stores), older_than, larger_than, remove=yes)
        return
    from clm_dist.prepare.encode import Effort
    from clm_dist.prepare.pipeline import prepare

    assert job_file is not None
    job = load_job(job_file, overrides or ())
    effort = Effort(tasks, int(partition_mib * 2**20))
    with unfailing("stdout"):
        try:
            with located(job), open_progress(err) as progress:
                store = prepare(job.config, open_stores(stores), progress, effort)
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on with the partitions that are left", style="red")
            raise typer.Exit(EX_INTERRUPTED) from None
        if show is not None:
            from clm_dist.prepare.show import show_store

            out.print(show_store(store.local, show))
        typer.echo(store.local)


def _verify(store: Path) -> None:
    problems = list(Store(store).verify())
    for problem in problems:
        err.print(problem, style="red", markup=False, soft_wrap=True)
    if problems:
        err.print("`clm-dist prepare` with the store's job makes it whole again", soft_wrap=True)
        raise typer.Exit(1)
    out.print(f"{store}: every hash and count is as its manifest says", soft_wrap=True)


def _prune(stores: Stores, older_than: float, larger_than: float, *, remove: bool) -> None:
    if remove and not (older_than or larger_than):
        raise ConfigError("--prune --yes would remove every store; say which, with --older-than or --larger-than")
    found = stores.stored()
    table = Table("store", "from", "blocks", "MB", "days ago", "")
    chosen = [store for store in found if store.age_days >= older_than and store.num_bytes >= larger_than * 1e6]
    for stored in found:
        verdict = "keep"
        if stored in chosen:
            verdict = "to remove" if not remove else "removed" if stored.store.remove() else "in use"
        table.add_row(
            stored.store.fingerprint,
            stored.origin,
            f"{stored.num_blocks:,}",
            f"{stored.num_bytes / 1e6:,.1f}",
            f"{stored.age_days:.1f}",
            verdict,
        )
    out.print(table)
    if chosen and not remove:
        out.print(
            f"{len(chosen)} of {len(found)} stores in {stores.local} would be removed; --yes removes them",
            soft_wrap=True,
        )
