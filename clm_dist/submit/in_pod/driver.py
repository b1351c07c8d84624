"""The driver of a run on Kubernetes: `python -m clm_dist.submit.in_pod.driver`, beside Ray's head.

It runs `clm-dist run`, and runs it again when that saved because other pods end (75). It keeps the output of all
attempts in the submission's log, and adds how far training is, for `clm-dist status`, which does not see the claim. It
ends when a later attempt has begun, which happens if the cluster has lost this
pod's node while the node still runs.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clm_dist.against_plan import describe_time
from clm_dist.config.differences import differing_fields
from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import ClmDistError, MendFirstError, SubmitError, TryAgainError
from clm_dist.files.atomic import make_dir, write_text
from clm_dist.files.record_types import Record
from clm_dist.files.records import RecordReader, read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import remove_run
from clm_dist.files.standing import RECENT_STEPS
from clm_dist.submit.in_pod.pod import DASHBOARD_PORT, JOB_DIR, PLAN, Pod, exit_code, now
from clm_dist.submit.in_pod.ray_jobs import RayJobs
from clm_dist.submit.training import Training, recent

_GOES_ON = TryAgainError.exit_code
_MEND_FIRST = MendFirstError.exit_code
_POLL_S = 2.0
_PAUSE_S = 5.0
_TELL_S = 10.0
"""Between two lines of how far training is."""
_MOST_IDLE = 12
"""Runs in a row that end with 75 before a worker has begun; each waits up to five minutes for nodes."""
_MOST_STUCK = 5
"""Runs in a row that end with 75 though workers have begun, and commit no further checkpoint: the disk may be full."""


class PodDriver:
    """`clm-dist run` in this pod.

    Args:
        run: the directory that the command writes.
        command: what is run.
        gives_up: end the attempt if no worker begins to train for long, because new pods may help.
    """

    def __init__(self, pod: Pod, run: RunDir, command: Sequence[str], *, gives_up: bool) -> None:
        self._pod, self._run, self._command, self._gives_up = pod, run, command, gives_up
        self._attempt = f"{pod.name}.{time.time_ns()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._told = self._gave_way = False
        self._over = threading.Event()
        self._seen = (0, 0)
        self._records = RecordReader(run.metrics, from_end=True)
        self._recent: list[Record] = []
        self._training: Training | None = None
        self._planned: str | None = None
        self._plan_due = 0.0

    @property
    def told(self) -> bool:
        """Whether a signal told it to end."""
        return self._told

    def run(self, overwritten: JobConfig | None = None) -> int:
        """Run to the end, and return the exit code.

        Args:
            overwritten: the job, whose run is removed unless an earlier attempt of this submission has done so.
        """
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        make_dir(self._pod.state)
        write_text(self._pod.state / "attempt", f"{self._attempt}\n")
        threading.Thread(target=self._give_way, daemon=True).start()
        teller = threading.Thread(target=self._tell_often)
        teller.start()
        try:
            if overwritten:
                self._remove_once(overwritten)
            return self._run_until_over()
        finally:
            self._over.set()
            teller.join()

    def _run_until_over(self) -> int:
        """Run, again as long as that helps, and return the exit code."""
        self._say(f"an attempt begins in the pod {self._pod.name}")
        starts, committed = self._progress()
        idle = stuck = 0
        while not self._told:
            code = self._run_once()
            if self._gave_way:
                return 1
            if code != _GOES_ON or self._told:
                break
            before, (starts, now_committed) = starts, self._progress()
            idle = idle + 1 if starts == before else 0
            stuck = stuck + (starts > before) if now_committed <= committed else 0
            committed = max(committed, now_committed)
            if stuck == _MOST_STUCK:
                self._say(f"workers have begun {stuck} times and saved nothing further, so this attempt ends")
                return 1
            if idle == _MOST_IDLE and self._gives_up:
                self._say(f"no worker has begun to train {idle} times in a row, so this attempt ends")
                return 1
            self._say("it goes on here")
            time.sleep(_PAUSE_S)
        if not self._process:
            return _GOES_ON
        # A process that is ended before it can handle the signal does not end with 75 itself.
        return _GOES_ON if self._told and code not in (0, _MEND_FIRST) else code

    def _remove_once(self, job: JobConfig) -> None:
        """Remove the job's run, in the first attempt of a submission only."""
        path = self._pod.state / "removed"
        if not path.exists() or path.read_text() != self._pod.submission:
            remove_run(job, self._run)
            write_text(path, self._pod.submission)

    def _progress(self) -> tuple[int, int]:
        """How often workers have started, and the last step whose checkpoint is committed."""
        with contextlib.suppress(OSError):  # the claim may be away for a moment
            records = list(read_records(self._run.metrics, last_steps=0))
            starts = sum(record["kind"] == "start" for record in records)
            committed = [r["step"] for r in records if r["kind"] == "checkpoint" and "error" not in r]
            self._seen = starts, max(committed, default=0)
        return self._seen

    def _run_once(self) -> int:
        pipe = subprocess.PIPE
        with subprocess.Popen(self._command, stdout=pipe, stderr=subprocess.STDOUT) as process:
            self._process = process
            if self._told:  # while it was being started
                process.terminate()
            assert process.stdout
            for line in process.stdout:
                self._keep(line)
        code = exit_code(process.returncode)
        self._say(f"the driver has ended with {code}")
        return code

    def _say(self, text: str) -> None:
        self._keep(f"{now()} {text}\n".encode())

    def _keep(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk ends no run
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        with contextlib.suppress(OSError), self._pod.log.open("ab") as log:
            log.write(line)

    def _tell_often(self) -> None:
        while not self._over.wait(_TELL_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        """Write how far training is, if it is further."""
        with contextlib.suppress(OSError, ClmDistError):  # the claim may be away for a moment
            added, is_new = self._records.new()
            if is_new or not self._recent:  # also steps before the last start count
                self._recent = list(read_records(self._run.metrics, last_steps=RECENT_STEPS))
            self._recent = recent([*self._recent, *added])
        if (training := Training.of_records(self._recent)) is None:
            return
        training = replace(training, planned=self._beside_plan())
        if training != self._training:
            self._training = training
            self._say(training.as_line())

    def _beside_plan(self) -> str | None:
        """The time that was planned and the one that the run takes; read anew in a twentieth of the time at most."""
        if (began := time.monotonic()) >= self._plan_due or self._over.is_set():
            # The line may be the last of this pod, so it does not say when the run is done.
            self._planned = describe_time(self._run, trains=False)
            self._plan_due = began + 20 * (time.monotonic() - began)
        return self._planned

    def _end(self, number: int, _frame: Any) -> None:
        self._told = True
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def _give_way(self) -> None:
        while not self._over.wait(_POLL_S):
            with contextlib.suppress(OSError):  # the claim may be away for a moment
                found = (self._pod.state / "attempt").read_text().strip()
                # After a signal the run saves, and the later attempt waits for the run's lock.
                if found not in ("", self._attempt) and not self._told:
                    # The main thread may end this process first, because it sees the killed command end.
                    self._gave_way = True
                    self._pod.say(f"the attempt {found} has begun, so this one ends")
                    if self._process:
                        self._process.kill()
                    os._exit(1)


def keep_plan(planned: Path, job: JobConfig, run: RunDir, *, accepts_other: bool) -> None:
    """Put the plan that was submitted with a job into the directory of its run.

    Args:
        accepts_other: whether the job may take the place of another one; else a run of another job keeps its own plan.
    """
    with contextlib.suppress(OSError, ClmDistError):  # no plan ends a run
        is_other = run.exists() and bool(differing_fields(read_saved_job(run.job), job))
        if planned.is_file() and (accepts_other or not is_other):
            make_dir(run.root)
            write_text(run.plan, planned.read_text(encoding="utf-8"), private=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--ray-job", metavar="ID", help="the job of Ray that this is the entrypoint of")
    options = parser.parse_args(arguments)
    pod, path = Pod.this(), Path(JOB_DIR) / "job.yaml"
    told = False
    try:
        job = read_saved_job(path)
        run = RunDir(Path(os.environ["CLM_DIST_RUNS"]) / job.name)
        keep_plan(path.with_name(PLAN), job, run, accepts_other=options.resume or options.overwrite)
        command = [sys.executable, "-m", "clm_dist", "run", str(path), *(["--resume"] if options.resume else [])]
        driver = PodDriver(pod, run, command, gives_up=options.ray_job is not None)
        code = driver.run(job if options.overwrite else None)
        told = driver.told
    except ClmDistError as error:
        pod.say(f"error: {error}")
        code = error.exit_code
    if options.ray_job and told and code == _GOES_ON:
        # If this process ended, Ray's job would fail. So the next head gets the job again.
        time.sleep(pod.grace_s)
    if options.ray_job and code == _MEND_FIRST:
        # The operator tries a failed job again, but not a stopped one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(SubmitError):
            RayJobs(f"http://127.0.0.1:{DASHBOARD_PORT}", os.environ.get("RAY_AUTH_TOKEN")).stop(options.ray_job)
            time.sleep(pod.grace_s)  # until the signal
    return code


if __name__ == "__main__":
    sys.exit(main())
