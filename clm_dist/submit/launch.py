"""Submit, look at and cancel: what `clm-dist submit slurm`, and `status`, `logs` and `cancel` on any cluster, do."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError, SubmitError
from clm_dist.files.atomic import make_dir, read_json, write_text
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run, remove_run
from clm_dist.submit.k8s import backend as k8s_launch
from clm_dist.submit.k8s.logs import PodLogs
from clm_dist.submit.slurm import commands as slurm_commands
from clm_dist.submit.slurm import render as slurm
from clm_dist.submit.slurm.logs import Logs
from clm_dist.submit.states import JobState, RunState
from clm_dist.submit.submission import Submission, submissions

_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/local", "/scratch/local", "/localscratch")
_RECENT_STEPS = 50


def check_submission(
    jobs: Sequence[JobConfig], request: slurm.Request, *, prepare_first: bool, overwrite: bool
) -> None:
    """Find what is wrong with a submission while nothing is queued yet.

    Raises:
        ConfigError: it does not fit the cluster, a run of its name is queued, running or done, or exists with
            another job.
        SubmitError: there is no Slurm here.
    """
    submission = request.submission
    slurm_commands.check_cluster(jobs[0].cluster.slurm, prepare_first=prepare_first)
    check_name(submission)
    for job in jobs:
        run, done = find_run(job, submission.runs, resume=request.resume, overwrite=overwrite)
        if done:
            raise ConfigError(
                f"the run {run.root} is done already; start it again with --overwrite, or make another run with "
                "--set name=...",
                field="name",
            )


def check_name(submission: Submission) -> None:
    """Raise ConfigError where one of its runs waits or runs already, as far as it was submitted from here."""
    for earlier in submissions(submission.runs):
        names = set(earlier.run_names) & set(submission.run_names)
        # A name is a directory, too, which a job that runs has its files in.
        if (names or earlier.name == submission.name) and _is_still_active(earlier, submission):
            job = earlier.job_id if earlier.k8s else f"job {earlier.job_id}"
            what = f"{min(names, default=earlier.name)} is queued or running already, as {job}"
            raise ConfigError(
                f"{what}; see it with `clm-dist status {earlier.name}`, end it with `clm-dist cancel {earlier.name}`, "
                "or make another run with --set name=...",
                field="name",
            )


def _is_still_active(earlier: Submission, submission: Submission) -> bool:
    try:
        return is_active(earlier)
    except SubmitError:
        if (earlier.backend, earlier.k8s) == (submission.backend, submission.k8s):
            raise
        return False  # another cluster, which may be gone


def local_places(request: slurm.Request) -> list[str]:
    """Directories that every node must see, and that by their names are on one host's own disk."""
    places = {"--runs": str(request.submission.runs), "--store": request.store}
    return [f"{name} {place}" for name, place in places.items() if any(Path(place).is_relative_to(d) for d in _LOCAL)]


def submit(
    jobs: Sequence[JobConfig], request: slurm.Request, *, prepare_first: bool = False, overwrite: bool = False
) -> Submission:
    """Queue a job, or a sweep of them, and remember it. Raises SubmitError with all that sbatch says."""
    submission = request.submission
    for task, job in enumerate(jobs):
        files = submission.files(task)
        make_dir(files.nodes)
        write_text(files.job, job_text(job))
    write_text(submission.script, slurm.render_run(jobs[0], request))
    # What is overwritten is there until sbatch has taken the job, and gone before that starts.
    prepare_id, options = None, ["--hold"] if overwrite else []
    if prepare_first:
        script = submission.root / "prepare-script"
        write_text(script, slurm.render_prepare(jobs[0], request))
        prepare_id = slurm_commands.submit_script(script)
        dependencies = [f"afterok:{prepare_id}", *_own_dependency(jobs[0])]
        options += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
    try:
        job_id = slurm_commands.submit_script(submission.script, *options)
    except SubmitError:
        if prepare_id:
            slurm_commands.cancel_job(prepare_id)
        raise
    submitted = replace(submission, job_id=job_id, prepare_id=prepare_id, submitted=time.time())
    submitted.write()
    if overwrite:
        try:
            for job in jobs:
                remove_run(job, RunDir(submission.runs / job.name))
        except BaseException:  # Ctrl-C, too: what is held is never let go
            cancel(submitted)
            raise
        slurm_commands.release_job(job_id)
    return submitted


def _own_dependency(job: JobConfig) -> list[str]:
    given = job.cluster.slurm.options.get("dependency")
    return [str(given)] if given else []


def run_states(submission: Submission) -> list[RunState]:
    """How far each run of a submission is. Raises SubmitError where the cluster does not answer."""
    if submission.k8s:
        return [k8s_launch.run_state(submission)]
    states = _states(submission)
    found = []
    for task, name in enumerate(submission.run_names):
        job_id = submission.task_id(task)
        run = RunDir(submission.runs / name)
        result = None
        # Not that of a run which this submission is to go on with.
        if run.result.exists() and run.result.stat().st_mtime >= submission.submitted:
            result = read_json(run.result)
        found.append(RunState(name, job_id, states.get(job_id), result=result, **_progress(run)))
    return found


def prepare_state(submission: Submission) -> JobState | None:
    """Of the job that prepares first, if there is one that Slurm still knows."""
    if submission.prepare_id is None:
        return None
    return slurm_commands.job_states(submission.prepare_id).get(submission.prepare_id)


def is_active(submission: Submission) -> bool:
    """Whether one of a submission's jobs waits or runs."""
    if submission.k8s:
        return k8s_launch.is_active(submission)
    states = [prepare_state(submission), *_states(submission).values()]
    return any(state is not None and state.active for state in states)


def cancel(submission: Submission, task: int | None = None) -> bool:
    """End a submission's jobs, or one run of a sweep; false where they have ended. What runs have saved stays."""
    if submission.k8s:
        return k8s_launch.cancel(submission)
    whole = [submission.prepare_id, submission.job_id]
    cancelled = False
    for job_id in filter(None, whole if task is None else [submission.task_id(task)]):
        if any(state.active for state in slurm_commands.job_states(job_id).values()):
            slurm_commands.cancel_job(job_id)
            cancelled = True
    return cancelled


def open_logs(submission: Submission) -> Logs | PodLogs:
    """The logs of all hosts of a submission."""
    return PodLogs(submission, submission.k8s) if submission.k8s else Logs(submission)


def _states(submission: Submission) -> dict[str, JobState]:
    return slurm_commands.job_states(str(submission.job_id))


def _progress(run: RunDir) -> dict[str, Any]:
    records = read_records(run.metrics)
    starts = [record for record in records if record["kind"] == "start"]
    steps = [record for record in records if record["kind"] == "step"]
    if not starts:
        return {}
    num_steps = starts[-1]["num_steps"]
    if not steps:
        return {"step": starts[-1]["step"], "num_steps": num_steps}
    each = statistics.median(record["seconds"] for record in steps[-_RECENT_STEPS:])
    step = steps[-1]["step"]
    left = (num_steps - step) * each
    return {"step": step, "num_steps": num_steps, "loss": steps[-1]["loss"], "seconds_left": left}
