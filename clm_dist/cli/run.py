"""The commands that make a run and show it: `run`, `train`, `report`, `push`."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from clm_dist.against_plan import compare_with_plan, describe_time
from clm_dist.cli.complete import complete_run
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
from clm_dist.cli.streams import unfailing
from clm_dist.config.load import load_job, located, read_saved_job
from clm_dist.config.paths import local_dir, local_path
from clm_dist.errors import ClmDistError, ConfigError, TryAgainError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.final import check_final
from clm_dist.files.records import read_records
from clm_dist.files.result import Result, read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import DEFAULT_STORES
from clm_dist.progress import err, out
from clm_dist.signals import STOPS, handling

EX_TEMPFAIL = TryAgainError.exit_code
"""Preempted with a checkpoint saved: run it again (sysexits.h)."""
EX_INTERRUPTED = 130
"""Ended by Ctrl-C without a checkpoint (128 + SIGINT, as shells say it)."""


def _run_path(value: str) -> Path:
    return local_path(value, "RUN")


def _output_path(value: str) -> Path:
    path = local_path(value, "--output")
    if path.is_dir():
        raise ConfigError(f"--output {value} is a directory; name the file of the page, for example {path}/page.html")
    if path.exists() and not (path.is_file() and path.read_bytes()[:15].lower() == b"<!doctype html>"):
        raise ConfigError(f"--output {value} is there and is no page of a report; name another file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {value}: there is no directory {path.absolute().parent}; make it first")
    return path


def run(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: StoreOption = DEFAULT_STORES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Prepare, train, evaluate and report; push if the job says so."""
    _run(job_file, overrides, runs, stores, resume=resume, overwrite=overwrite, only_train=False)


def train(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: StoreOption = DEFAULT_STORES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on blocks that `prepare` made."""
    _run(job_file, overrides, runs, stores, resume=resume, overwrite=overwrite, only_train=True)


def push(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", parser=_run_path, autocompletion=complete_run, help="Run directory.")
    ],
    repo: Annotated[str | None, typer.Option("--repo", help="Repository, instead of the job's.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository, instead of the job's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be pushed, and push nothing.")] = False,
) -> None:
    """Push a run's final model to the Hub."""
    from clm_dist import hub
    from clm_dist.report.card import write_card

    directory = RunDir(run_dir)
    result = read_result(run_dir)
    check_final(directory, read_all=True)
    job = read_saved_job(directory.job)
    write_card(directory.final, directory, job, result, repo=hub.find_repo(job, repo))
    if dry_run:
        with unfailing("stdout"):
            _print_files(hub.files_to_push(directory.final))
            out.print(f"nothing was pushed to {hub.repo_of(job, repo)}", soft_wrap=True)
        return
    url = hub.push(job, directory, directory.final, result["train"]["steps"], repo=repo, private=private)
    with unfailing("stdout"):
        out.print(f"pushed to {url}", soft_wrap=True)


def _print_files(files: Sequence[tuple[str, int]]) -> None:
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, size in files:
        table.add_row(name, f"{size:,}")
    out.print(table)
    out.print(f"{len(files)} files, {sum(size for _, size in files) / 1e6:,.1f} MB")


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            parser=_run_path,
            autocompletion=complete_run,
            help="Run directories; several are compared.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            parser=_output_path,
            metavar="FILE",
            help="Where the page is written.",
            show_default="report.html in RUN; comparison.html beside the first of several",
        ),
    ] = None,
) -> None:
    """Print a run's figures and write its report.html; compare several runs."""
    from clm_dist.report.live import read_progress

    results = [read_progress(path) for path in run_dirs]
    if len(results) > 1:
        _compare(run_dirs, results, output)
        return
    from clm_dist.report.history import History
    from clm_dist.report.page import write_page
    from clm_dist.report.planned import plan_table
    from clm_dist.report.table import checkpoint_table, result_table

    directory = RunDir(run_dirs[0])
    history = History.of(read_records(directory.metrics))
    page = output or directory.report
    out.print(result_table(results[0]))
    if (beside_plan := compare_with_plan(directory, history)) is not None:
        out.print(plan_table(beside_plan))
    try:
        checkpoints = Checkpoints.of_run(read_saved_job(directory.job), directory)
        with checkpoints.reaching():
            if (saved := checkpoint_table(checkpoints)) is not None:
                out.print(saved)
    except ClmDistError as error:
        err.print(f"the checkpoints cannot be listed: {error}", style="yellow", markup=False, soft_wrap=True)
    write_page(directory, results[0], page, history=history)
    out.print(f"report: {page}", soft_wrap=True)


def _compare(run_dirs: list[Path], results: list[Result], output: Path | None) -> None:
    """Print the figures of several runs and write the page that compares them."""
    from clm_dist.report.better import verdicts
    from clm_dist.report.compare import comparability, comparison_table, labels_of
    from clm_dist.report.compare_page import write_comparison

    labels = labels_of(run_dirs, results)
    page = output or run_dirs[0].absolute().parent / "comparison.html"
    runs = [RunDir(path) for path in run_dirs]
    planned = [f"{label}: {line}" for label, run in zip(labels, runs, strict=True) if (line := describe_time(run))]
    said = [*verdicts(runs, labels, results), *planned]
    out.print(comparison_table(labels, results, out.width))
    if warning := comparability(results):
        out.print(warning, style="yellow", soft_wrap=True)
    for verdict in said:
        out.print(verdict, markup=False, soft_wrap=True)
    write_comparison(page, runs, labels, results, said)
    out.print(f"report: {page}", soft_wrap=True)


def _run(
    job_file: Path,
    overrides: list[str] | None,
    runs: str,
    stores: str,
    *,
    resume: bool,
    overwrite: bool,
    only_train: bool,
) -> None:
    from clm_dist.run import run_job

    job = load_job(job_file, overrides or ())
    runs_dir, kept = local_dir(runs, "--runs"), open_stores(stores)
    try:
        with unfailing("stdout"), located(job), handling(STOPS, _stop):
            result = run_job(job.config, runs_dir, kept, resume=resume, overwrite=overwrite, only_train=only_train)
    except _Stopped as stopped:
        err.print(f"stopped by {stopped}; the same command goes on with what is left", style="yellow")
        raise typer.Exit(EX_TEMPFAIL) from None
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on from the last checkpoint, if there is one", style="red")
        raise typer.Exit(EX_INTERRUPTED) from None
    if result["status"] == "preempted":
        checkpoints = Checkpoints.of_run(job.config, RunDir(runs_dir / job.config.name))
        with checkpoints.reaching():
            is_saved = bool(checkpoints.committed())
        saved = f"after step {result['train']['steps']} with a checkpoint saved; the same command goes on from it"
        err.print(
            f"stopped {saved if is_saved else 'before the first checkpoint; the same command starts again'}",
            style="yellow",
        )
        raise typer.Exit(EX_TEMPFAIL)


class _Stopped(KeyboardInterrupt):
    """A signal told the command to stop, and nothing had to be saved."""


def _stop(number: int, _frame: Any) -> None:
    raise _Stopped(signal.Signals(number).name)
