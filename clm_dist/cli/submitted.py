"""The commands for what was submitted: `status`, which also shows runs that were not, `logs`, `cancel`."""

import contextlib
import errno
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from clm_dist.against_plan import describe_time
from clm_dist.cli.complete import complete_submission, complete_submission_or_run
from clm_dist.cli.options import DEFAULT_RUNS, Runs
from clm_dist.cli.streams import unfailing
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json
from clm_dist.files.lease import holder_of
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.standing import RECENT_STEPS
from clm_dist.progress import out
from clm_dist.submit.launch import backend_of
from clm_dist.submit.logs import follow as follow_lines
from clm_dist.submit.states import describe
from clm_dist.submit.submission import find_submission, seek_submission, submissions
from clm_dist.submit.training import Training
from clm_dist.timing import clock

_MOST_NAMES = 8
Which = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        autocompletion=complete_submission,
        help="Name of a run or a submission, or number of a job; default: the last submission.",
    ),
]


def status(
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            autocompletion=complete_submission_or_run,
            help="Name of a run or a submission, or number of a job; default: the last submission, or the last run.",
        ),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Show how far a run or a submission is: in the queue, in training steps, and beside its plan."""
    directory = local_dir(runs, "--runs")
    found = submissions(directory)
    if (sought := seek_submission(found, which)) is None:
        if (local := _find_run(directory, which)) is None:
            raise _nothing_found(directory, which, [one.name for one in found])
        with _reading(local.root):
            _print_run(local)
        return
    submission, _ = sought
    status = backend_of(submission).status(submission)
    if status.note:
        out.print(status.note, soft_wrap=True, markup=False)
    table = Table("run", "job", "state", "hosts", "attempt", "step", "loss", "training left", "time left")
    for run in status.runs:
        training = run.training
        left = training.seconds_left if training and run.is_training else None
        table.add_row(
            run.name,
            run.job_id,
            Text(describe(run)),
            run.job.nodes if run.job else "",
            "" if run.job is None or run.job.restarts is None else str(run.job.restarts),
            "" if training is None else f"{training.step}/{training.num_steps}",
            "" if training is None or training.loss is None else f"{training.loss:.4f}",
            "" if left is None else clock(left),
            clock(run.job.seconds_left) if run.job and run.job.seconds_left is not None else "",
        )
    out.print(table)
    for run in status.runs:
        if run.job and run.job.reason:
            out.print(f"{run.name}: {run.job.reason}", soft_wrap=True, markup=False)
        if run.planned:
            out.print(f"{run.name}: {run.planned}", soft_wrap=True, markup=False, highlight=False)
    ended = [run for run in status.runs if run.job and not run.job.active and run.job.state != "DELETED"]
    if any(not (run.result and run.result["status"] == "done") for run in ended):
        out.print(f"why: clm-dist logs {submission.name} -n 40", soft_wrap=True)
    done = [str(submission.runs / run.name) for run in status.runs if run.result and run.result["status"] == "done"]
    if len(done) > 1:
        out.print(f"compare them: clm-dist report {' '.join(done)}", soft_wrap=True)


def _find_run(runs: Path, which: str | None) -> RunDir | None:
    """The run or plan of a name or a path, or the run that has trained last for None; None where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    if which is None:
        return max(_begun(runs), key=lambda begun: begun[0], default=(0.0, None))[1]
    for root in (runs / which, Path(which)):
        run = RunDir(root if root.name not in ("", "..") else root.resolve())
        with contextlib.suppress(ValueError), _reading(root):  # no name of a file
            if run.exists() or run.plan.is_file():
                return run
    return None


def _begun(runs: Path) -> Iterator[tuple[float, RunDir]]:
    """The runs that have begun, each with the time of its last record."""
    for run in map(RunDir, runs.glob("*")):
        with contextlib.suppress(OSError):  # another user's, or it is being removed
            if run.exists():
                yield run.metrics.stat().st_mtime, run


@contextlib.contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turn a refusal to read a run into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            look = f"`ls -ld {shlex.quote(str(root))}` shows who may"
            raise ConfigError(f"the run {root} cannot be read: {error.strerror}; {look}") from None


def _nothing_found(runs: Path, which: str | None, submitted: Sequence[str]) -> ConfigError:
    """The error where there is neither a submission nor a run of a name, or none at all for None."""
    how = "--runs names another directory, `clm-dist run JOB` starts a run, and `clm-dist submit slurm|k8s JOB` submits"
    if which is None:
        return ConfigError(f"there is no run in {runs}, and nothing was submitted from it; {how}")
    names = sorted({*submitted, *(run.root.name for _, run in _begun(runs))})
    there = f" (there: {', '.join(names[:_MOST_NAMES])}{', ...' * (len(names) > _MOST_NAMES)})" if names else ""
    return ConfigError(f"no run and no submission {which} in {runs}{there}; {how}")


def _print_run(run: RunDir) -> None:
    """Show how far a run is that was not submitted."""
    training = Training.of_records(read_records(run.metrics, last_steps=RECENT_STEPS))
    table = Table("run", "state", "step", "loss", "training left")
    state = _state_of(run)
    left = training.seconds_left if training and not run.result.is_file() else None
    table.add_row(
        Text(run.root.name),
        Text(state),
        "" if training is None else f"{training.step}/{training.num_steps}",
        "" if training is None or training.loss is None else f"{training.loss:.4f}",
        "" if left is None else clock(left),
    )
    out.print(table)
    if planned := describe_time(run):
        out.print(f"{run.root.name}: {planned}", soft_wrap=True, markup=False, highlight=False)


def _state_of(run: RunDir) -> str:
    """The state of a run that was not submitted, in words."""
    if run.result.is_file():
        return str(read_json(run.result).get("status"))
    if not run.exists():
        return "not begun"
    held = holder_of(run.root)
    if held is None or (runs := held.holder.runs()) is False:
        return "stopped"
    if runs:
        return f"running ({held.holder})"
    touched = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.touched))
    return f"perhaps running ({held.holder}; last sign of life {touched})"


def logs(
    which: Which = None,
    runs: Runs = DEFAULT_RUNS,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the job ends.")] = False,
    last: Annotated[
        int | None, typer.Option("--last", "-n", min=0, help="Print only this many of the last lines.")
    ] = None,
) -> None:
    """Print the logs of a submission, of all attempts and hosts, with the host before every line."""
    submission, _ = find_submission(local_dir(runs, "--runs"), which)
    backend = backend_of(submission)
    merged = backend.logs(submission)
    lines = merged.new_lines()
    for line in lines if last is None else lines[len(lines) - min(last, len(lines)) :]:
        typer.echo(line)
    if follow:
        for line in follow_lines(merged.new_lines, lambda: backend.is_active(submission)):
            typer.echo(line)


def cancel(which: Which = None, runs: Runs = DEFAULT_RUNS) -> None:
    """End a submission. What its runs have saved stays, and submitting again continues from it."""
    submission, task = find_submission(local_dir(runs, "--runs"), which)
    with unfailing("stdout"):
        out.print(backend_of(submission).cancel(submission, task), soft_wrap=True, markup=False)
