"""The `clm-dist` command: parse, call, exit code. Stages are imported when they run, so that --help is quick."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.table import Table

from clm_dist import __version__, cli_submit
from clm_dist.cli_options import (
    DEFAULT_RUNS,
    DEFAULT_STORES,
    JobFile,
    Overrides,
    Overwrite,
    Resume,
    Runs,
    Stores,
    located,
)
from clm_dist.config.data import TokenizerConfig
from clm_dist.config.job import ModelConfig
from clm_dist.config.load import Job, load_job, read_saved_job
from clm_dist.config.paths import local_dir, local_path
from clm_dist.config.schema import job_schema
from clm_dist.errors import ClmDistError, ConfigError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import open_stores
from clm_dist.progress import err, open_progress, out

logger = logging.getLogger(__name__)

EX_TEMPFAIL = 75
"""Preempted with a checkpoint saved: run it again (sysexits.h)."""
EX_INTERRUPTED = 130
"""Ended by Ctrl-C without a checkpoint (128 + SIGINT, as shells say it)."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a causal language model on a cluster, and trust what it says.",
)


def _run_path(value: str) -> Path:
    return local_path(value, "RUN")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _set_up(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    ours = logging.getLogger("clm_dist")
    if not ours.handlers:
        # On our logger, not the root: libraries that print their own warnings would print them twice.
        ours.addHandler(RichHandler(console=err, show_time=False, show_path=False))
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)


@app.command()
def run(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: Stores = DEFAULT_STORES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Prepare, train, evaluate and report; push if the job says so."""
    _run(job_file, overrides, runs, stores, resume=resume, overwrite=overwrite, only_train=False)


@app.command()
def prepare(
    context: typer.Context,
    job_file: Annotated[
        Path | None, typer.Argument(metavar="JOB", help="Job file, for example jobs/quickstart.yaml.")
    ] = None,
    overrides: Overrides = None,
    stores: Stores = DEFAULT_STORES,
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
        if not is_there and (wrong := [name for name in names if _is_given(context, name)]):
            option = "--set" if wrong[0] == "overrides" else f"--{wrong[0].replace('_', '-')}"
            raise ConfigError(f"{option} goes with {owner}; leave it out")
    if verify is not None:
        _verify(verify)
        return
    if prune:
        _prune(open_stores(stores, DEFAULT_STORES)[0], older_than, larger_than, remove=yes)
        return
    from clm_dist.prepare.encode import Effort
    from clm_dist.prepare.pipeline import prepare

    assert job_file is not None
    job = load_job(job_file, overrides or ())
    effort = Effort(tasks, int(partition_mib * 2**20))
    directory, url = open_stores(stores, DEFAULT_STORES)
    try:
        with located(job), open_progress(err) as progress:
            store = prepare(job.config, directory, progress, effort, url)
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on with the partitions that are left", style="red")
        raise typer.Exit(EX_INTERRUPTED) from None
    if show is not None:
        from clm_dist.prepare.show import show_store

        out.print(show_store(store, show))
    typer.echo(store)


def _verify(store: Path) -> None:
    from clm_dist.prepare.stores import verify_store

    problems = list(verify_store(store))
    for problem in problems:
        err.print(problem, style="red", markup=False, soft_wrap=True)
    if problems:
        err.print("`clm-dist prepare` with the store's job makes it whole again", soft_wrap=True)
        raise typer.Exit(1)
    out.print(f"{store}: every hash and count is as its manifest says", soft_wrap=True)


def _prune(stores: Path, older_than: float, larger_than: float, *, remove: bool) -> None:
    from clm_dist.prepare.stores import list_stores, remove_store

    if remove and not (older_than or larger_than):
        raise ConfigError("--prune --yes would remove every store; say which, with --older-than or --larger-than")
    found = list_stores(stores)
    table = Table("store", "from", "blocks", "MB", "days ago", "")
    chosen = [store for store in found if store.age_days >= older_than and store.num_bytes >= larger_than * 1e6]
    for store in found:
        verdict = "keep"
        if store in chosen:
            verdict = "to remove" if not remove else "removed" if remove_store(store.path) else "in use"
        table.add_row(
            store.path.name,
            store.origin,
            f"{store.num_blocks:,}",
            f"{store.num_bytes / 1e6:,.1f}",
            f"{store.age_days:.1f}",
            verdict,
        )
    out.print(table)
    if chosen and not remove:
        out.print(
            f"{len(chosen)} of {len(found)} stores in {stores} would be removed; --yes removes them", soft_wrap=True
        )


@app.command()
def train(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    stores: Stores = DEFAULT_STORES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on blocks that `prepare` made."""
    _run(job_file, overrides, runs, stores, resume=resume, overwrite=overwrite, only_train=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, model directory or Hub id.")],
    job_file: Annotated[
        Path | None, typer.Option("--job", help="Job whose eval split is used; a run directory has its own.")
    ] = None,
    overrides: Overrides = None,
    stores: Stores = DEFAULT_STORES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model on a job's eval split: loss, perplexity, bits per byte."""
    from clm_dist.generate import find_model
    from clm_dist.prepare.pipeline import prepare
    from clm_dist.train.evaluate import evaluate_model
    from clm_dist.train.model import load_config

    path = find_model(model)
    saved = RunDir(local_path(model, "MODEL")).job
    if job_file is None and not saved.is_file():
        raise ConfigError(f"{model} is no run directory, so name the job whose eval split to use: --job JOB")
    job = load_job(job_file or saved, overrides or ())
    update: dict[str, Any] = {"model": ModelConfig(path=path)}
    if job_file is not None or overrides:
        # A model is measured on its own tokens: another tokenizer's ids mean nothing to it.
        update["tokenizer"] = TokenizerConfig(path=path)
    # Where the job names its own model and tokenizer is no place of an error of this model.
    origins = {field: place for field, place in job.origins.items() if field.partition(".")[0] not in update}
    config = job.config.model_copy(update=update)
    with located(Job(config, origins)), open_progress(err) as progress:
        load_config(config)
        # The untouched job of a run keeps the tokenizer that it names, and so the blocks that are there already.
        tokens = config if "tokenizer" in update else job.config
        directory, url = open_stores(stores, DEFAULT_STORES)
        store = prepare(tokens, directory, progress, url=url)
        evaluation = evaluate_model(path, config, store, progress)
    figures = evaluation.as_dict()
    if as_json:
        typer.echo(json.dumps({name: figures[name] for name in _FIGURES}))
    else:
        typer.echo(", ".join(f"{name.replace('_', ' ')} {_shown(figures[name])}" for name in _FIGURES))


_FIGURES = ("loss", "perplexity", "bits_per_byte", "num_tokens")


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Run directory, model directory or Hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from; repeatable.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="File with a prompt a line; - or nothing at all is standard input.")
    ] = None,
    use_pipeline: Annotated[
        bool, typer.Option("--pipeline", help="transformers' text-generation pipeline with its own defaults.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    top_k: Annotated[int, typer.Option(min=0)] = 50,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same text.")] = 42,
) -> None:
    """Generate text from prompts."""
    from clm_dist import generate as stage

    sampled = ("max_new_tokens", "top_k", "top_p", "temperature", "greedy")
    given = [f"--{name.replace('_', '-')}" for name in sampled if _is_given(context, name)]
    if use_pipeline and given:
        raise ConfigError(
            f"--pipeline has defaults of its own and takes no {', '.join(given)}; leave out the one or the other"
        )
    path = stage.find_model(model)
    sampling = None if use_pipeline else stage.Sampling(max_new_tokens, top_k, top_p, temperature, greedy)
    for text in stage.generate(path, _prompts(prompt, file), seed=seed, sampling=sampling):
        typer.echo(text)
        typer.echo()


@app.command()
def push(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", parser=_run_path, help="Run directory.")],
    repo: Annotated[str | None, typer.Option("--repo", help="Repository, instead of the job's.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository, instead of the job's.")
    ] = None,
) -> None:
    """Push a run's final model to the Hub."""
    from clm_dist import hub
    from clm_dist.report.card import write_card

    directory = RunDir(run_dir)
    result = read_result(run_dir)
    if not directory.final.is_dir():
        raise ConfigError(f"the run {run_dir} has no final model yet; `clm-dist run {directory.job}` goes on with it")
    job = read_saved_job(directory.job)
    write_card(directory.final, job, result)
    url = hub.push(job, directory, directory.final, result["train"]["steps"], repo=repo, private=private)
    out.print(f"pushed to {url}", soft_wrap=True)


@app.command()
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=_run_path, help="Run directories; several are compared.")
    ],
) -> None:
    """Print a run's figures and write its report.html; compare several runs."""
    from clm_dist.report.compare import comparability, comparison_table
    from clm_dist.report.page import write_page
    from clm_dist.report.table import checkpoint_table, result_table

    results = [read_result(path) for path in run_dirs]
    if len(results) > 1:
        out.print(comparison_table(results))
        if warning := comparability(results):
            out.print(warning, style="yellow", soft_wrap=True)
        return
    directory = RunDir(run_dirs[0])
    write_page(directory, results[0])
    out.print(result_table(results[0]))
    try:
        checkpoints = Checkpoints.of_run(read_saved_job(directory.job), directory)
        with checkpoints.reaching():
            if (saved := checkpoint_table(checkpoints)) is not None:
                out.print(saved)
    except ConfigError as error:
        err.print(f"the checkpoints cannot be listed: {error}", style="yellow", markup=False, soft_wrap=True)
    out.print(f"report: {directory.report}", soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    typer.echo(json.dumps(job_schema(), indent=2))


app.add_typer(cli_submit.submit, name="submit")
for command in (cli_submit.status, cli_submit.logs, cli_submit.cancel):
    app.command()(command)


def main() -> None:
    """The command's entry point: our errors become a message and an exit code."""
    try:
        app()
    except ClmDistError as error:
        logger.debug("where it came from", exc_info=error)
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


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
    runs_dir, (stores_dir, url) = local_dir(runs, "--runs"), open_stores(stores, DEFAULT_STORES)
    try:
        with located(job):
            result = run_job(
                job.config, runs_dir, stores_dir, url, resume=resume, overwrite=overwrite, only_train=only_train
            )
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on from the last checkpoint", style="red")
        raise typer.Exit(EX_INTERRUPTED) from None
    if result["status"] == "preempted":
        err.print(
            f"stopped after step {result['train']['steps']} with a checkpoint saved; the same command goes on from it",
            style="yellow",
        )
        raise typer.Exit(EX_TEMPFAIL)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if given and file:
        raise ConfigError("give prompts with --prompt or with --file, not both")
    try:
        if given:
            prompts = given
        else:
            text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
            prompts = [line for line in text.splitlines() if line.strip()]
        for prompt in prompts:
            prompt.encode()  # Python lets bytes that are no text through on the command line.
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {file}: {error.strerror}") from None
    except UnicodeError as error:
        where = f" in {file}" if file else ""
        raise ConfigError(f"the prompts{where} are not UTF-8 text: {error}; convert them, e.g. with iconv") from None
    if not prompts:
        raise ConfigError("there is no prompt; give one with --prompt, a file of them with --file, or standard input")
    return prompts


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _shown(value: float | int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
