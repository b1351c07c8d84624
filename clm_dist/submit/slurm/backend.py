"""Submit to Slurm, watch and cancel."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clm_dist.against_plan import describe_time
from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ClmDistError, ConfigError, SubmitError
from clm_dist.files.atomic import make_dir, read_json, write_text
from clm_dist.files.plan_file import PlanFile, write_plan
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run, remove_run
from clm_dist.files.standing import RECENT_STEPS
from clm_dist.submit.slurm import commands
from clm_dist.submit.slurm.logs import HostLogs
from clm_dist.submit.slurm.render import Request, hosts_of, render_prepare, render_run
from clm_dist.submit.states import JobState, RunState, Status
from clm_dist.submit.submission import Submission
from clm_dist.submit.training import Training

logger = logging.getLogger(__name__)

_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/local", "/scratch/local", "/localscratch")


@dataclass(frozen=True)
class Launch:
    """A job, or a sweep of jobs that ask Slurm for the same."""

    jobs: Sequence[JobConfig]
    request: Request
    prepare_first: bool = False
    """Prepare in a job of its own, on CPUs, before this one."""
    overwrite: bool = False
    """Remove the runs of these names, and start again."""
    plans: Sequence[PlanFile] = ()
    """Plan of each job; empty where none was asked for."""

    @property
    def submission(self) -> Submission:
        return self.request.submission


class SlurmBackend:
    """Slurm, by its commands: a script for sbatch, and sometimes one that prepares before it."""

    def render(self, launch: Launch) -> str:
        for job in launch.jobs:
            hosts_of(job.cluster).check()
        script, *others = {render_run(job, launch.request) for job in launch.jobs}
        if others:
            raise ConfigError("--array: its runs ask Slurm for different things; submit them one by one")
        return f"{render_prepare(launch.jobs[0], launch.request)}\n{script}" if launch.prepare_first else script

    def check(self, launch: Launch) -> None:
        commands.check_cluster(launch.jobs[0].cluster.slurm, prepare_first=launch.prepare_first)
        for job in launch.jobs:
            run, done = find_run(job, launch.submission.runs, resume=launch.request.resume, overwrite=launch.overwrite)
            if done:
                raise ConfigError(
                    f"the run {run.root} is done already; start it again with --overwrite, or make another run with "
                    "--set name=...",
                    field="name",
                )

    def warnings(self, launch: Launch) -> Iterator[str]:
        for place in local_places(launch.request):
            yield (
                f"{place} looks like a disk of this host alone, and every node must see it; name a directory on "
                "shared storage with --runs and --store, or CLM_DIST_RUNS and CLM_DIST_STORE"
            )
        yield from hosts_of(launch.jobs[0].cluster).warnings()

    def submit(self, launch: Launch) -> Submission:
        jobs, submission = launch.jobs, launch.submission
        # Logs of Ray are kept in it, and they hold environments.
        make_dir(submission.root, private=True)
        for task, job in enumerate(jobs):
            run_files = submission.files(task)
            make_dir(run_files.nodes)
            write_text(run_files.job, job_text(job), private=True)
        write_text(submission.script, render_run(jobs[0], launch.request), private=True)
        # A run that is overwritten stays until sbatch has accepted the job, and is removed before the job starts.
        prepare_id, options = None, ["--hold"] if launch.overwrite else []
        if launch.prepare_first:
            prepare_script = submission.root / "prepare-script"
            write_text(prepare_script, render_prepare(jobs[0], launch.request), private=True)
            prepare_id = commands.submit_script(prepare_script)
            own = jobs[0].cluster.slurm.options.get("dependency")
            dependencies = [f"afterok:{prepare_id}", *([str(own)] if own else [])]
            options += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
        try:
            job_id = commands.submit_script(submission.script, *options)
        except SubmitError:
            if prepare_id:
                commands.cancel_job(prepare_id)
            raise
        submitted = replace(submission, job_id=job_id, prepare_id=prepare_id, submitted=time.time())
        submitted.write()
        if launch.overwrite:
            try:
                for job in jobs:
                    remove_run(job, RunDir(submission.runs / job.name))
            except BaseException:  # also Ctrl-C: a held job would wait for ever
                self.cancel(submitted)
                raise
            commands.release_job(job_id)
        for job, plan in zip(jobs, launch.plans, strict=False):
            try:
                write_plan(RunDir(submission.runs / job.name), plan)
            except ClmDistError as error:  # the job is submitted
                logger.warning("the plan of %s is not kept: %s", job.name, error)
        return submitted

    def describe(self, submission: Submission) -> str:
        return f"job {submission.job_id}"

    def status(self, submission: Submission) -> Status:
        states = commands.job_states(str(submission.job_id))
        runs = []
        for task, name in enumerate(submission.run_names):
            job_id = submission.task_id(task)
            run = RunDir(submission.runs / name)
            result = None
            # An older result is that of the run which this submission continues.
            if run.result.exists() and run.result.stat().st_mtime >= submission.submitted:
                result = read_json(run.result)
            training = Training.of_records(read_records(run.metrics, last_steps=RECENT_STEPS))
            state = RunState(name, job_id, states.get(job_id), training, result)
            planned = describe_time(run, trains=state.is_training, since=submission.submitted)
            runs.append(replace(state, planned=planned))
        prepare = _prepare_state(submission)
        if prepare is None or prepare.state == "COMPLETED":
            return Status(runs)
        words = ": ".join(filter(None, [prepare.state.lower(), prepare.reason]))
        return Status(runs, f"prepare (job {submission.prepare_id}): {words}")

    def is_active(self, submission: Submission) -> bool:
        states = [_prepare_state(submission), *commands.job_states(str(submission.job_id)).values()]
        return any(state is not None and state.active for state in states)

    def logs(self, submission: Submission) -> HostLogs:
        return HostLogs(submission)

    def cancel(self, submission: Submission, task: int | None = None) -> str:
        number = submission.job_id if task is None else submission.task_id(task)
        cancelled = False
        for job_id in filter(None, [submission.prepare_id if task is None else None, number]):
            if any(state.active for state in commands.job_states(job_id).values()):
                commands.cancel_job(job_id)
                cancelled = True
        if not cancelled:
            return f"job {number} has ended already; nothing to cancel"
        return f"cancelled job {number}; submitting the same job again goes on from its last checkpoint"


def local_places(request: Request) -> list[str]:
    """Directories that every node must see, and that by their names are on one host's own disk."""
    places = {"--runs": str(request.submission.runs), "--store": request.store}
    return [f"{name} {place}" for name, place in places.items() if any(Path(place).is_relative_to(d) for d in _LOCAL)]


def _prepare_state(submission: Submission) -> JobState | None:
    """State of the job that prepares first, if there is one that Slurm still knows."""
    if submission.prepare_id is None:
        return None
    return commands.job_states(submission.prepare_id).get(submission.prepare_id)
