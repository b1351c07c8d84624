"""The `clm-dist` command: parse, call, exit code. Stages are imported when they run, so that --help is quick."""

import gc
import json
import logging
import os
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from clm_dist import __version__
from clm_dist.cli.doctor import doctor
from clm_dist.cli.evaluate import evaluate
from clm_dist.cli.init import init
from clm_dist.cli.model import generate
from clm_dist.cli.plan import plan
from clm_dist.cli.run import push, report, run, train
from clm_dist.cli.store import prepare
from clm_dist.cli.streams import open_missing, unfailing
from clm_dist.cli.submit import submit
from clm_dist.cli.submitted import cancel, logs, status
from clm_dist.config.schema import job_schema
from clm_dist.errors import ClmDistError
from clm_dist.progress import err

logger = logging.getLogger(__name__)


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a causal language model on a cluster, and trust what it says.",
)


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


def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    typer.echo(json.dumps(job_schema(), indent=2))


for command in (run, init, plan, doctor, prepare, train, evaluate, generate, push, report, schema):
    app.command()(command)
app.add_typer(submit, name="submit")
for command in (status, logs, cancel):
    app.command()(command)


def main() -> None:
    """The command's entry point: our errors become a message and an exit code."""
    # Imports make hundreds of thousands of objects that stay; to look at them every 700 takes a tenth of a start's CPU.
    gc.set_threshold(100_000)
    open_missing()
    with unfailing("stderr"):
        try:
            app()
        except ClmDistError as error:
            logger.debug("where it came from", exc_info=error)
            err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            if error.ends_process:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(error.exit_code)
            sys.exit(error.exit_code)
