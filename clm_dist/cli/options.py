"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.complete import DEFAULT_RUNS as DEFAULT_RUNS
from clm_dist.cli.complete import complete_job
from clm_dist.files.stores import DEFAULT_STORES, Stores

JOB_HELP = "Job file, or the name of a packaged job: quickstart."
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help=JOB_HELP, autocompletion=complete_job)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Set a field of the job; repeatable.")
]
Runs = Annotated[
    str, typer.Option("--runs", envvar="CLM_DIST_RUNS", help="Directory of the runs; every node must see it.")
]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="CLM_DIST_STORE",
        help="Directory of the prepared blocks, which every node sees, or a URL (s3://, gs://).",
        show_default="the user's cache directory",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run though the job has changed since.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run of this name and start again.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def open_stores(path: str) -> Stores:
    """The stores that `--store` names; copies of what is kept at a URL lie in the user's cache."""
    return Stores.at(path, DEFAULT_STORES)
