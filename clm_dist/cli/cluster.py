"""What `submit slurm` and `submit k8s` have in common."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import typer

from clm_dist.cli.streams import unfailing
from clm_dist.config.load import Job, located
from clm_dist.errors import ConfigError
from clm_dist.progress import err, out
from clm_dist.submit.backend import Backend, LaunchT
from clm_dist.submit.launch import check_name
from clm_dist.train.trackers.check import check_offers

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")]
PlanOn = Annotated[
    str | None,
    typer.Option("--plan", metavar="GPU", help="Print first what the job takes on this GPU; see `clm-dist plan`."),
]


def settings_of(section: str, options: Mapping[str, object]) -> list[str]:
    """The options that have a value, as settings of a section's fields."""
    return [f"{section}.{name}={json.dumps(value)}" for name, value in options.items() if value is not None]


def submit_to(backend: Backend[LaunchT], launch: LaunchT, job: Job, *, dry_run: bool) -> None:
    """Check a launch, submit it, and tell the user its name and what to do next.

    Args:
        job: the job as it was loaded, which knows the lines that an error is about.
    """
    with located(job):
        text = backend.render(launch)
        if dry_run:
            typer.echo(text, nl=False)
            return
        check_name(launch.submission)
        backend.check(launch)
    for warning in [*backend.warnings(launch), *_foreign_trackers(job.config.tracking)]:
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    submitted = backend.submit(launch)
    name = submitted.name
    first = f" after job {submitted.prepare_id}, which prepares" if submitted.prepare_id else ""
    with unfailing("stdout"):
        out.print(f"submitted {name} as {backend.describe(submitted)}{first}", soft_wrap=True)
        out.print(f"clm-dist status {name} · clm-dist logs -f {name} · clm-dist cancel {name}")


def _foreign_trackers(trackers: Sequence[str]) -> Iterator[str]:
    """A warning where a tracker is not installed here: it may be where the job runs, or be misspelt."""
    try:
        check_offers(trackers)
    except ConfigError as error:
        yield f"{error}; the job is refused where it is not there either"
