"""The driver of a run on Kubernetes: `python -m clm_dist.submit.pod_driver`, beside Ray's head.

It runs `clm-dist run`, again where that has saved because other pods are to end (75), and keeps what it says, over all
attempts, in the submission's log. It gives way to a later attempt, which begins where this pod's node is lost to the
cluster and lives on.
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
from pathlib import Path
from typing import Any

from clm_dist.errors import ClmDistError, ConfigError, NotReadyError, SubmitError
from clm_dist.job import read_saved_job
from clm_dist.run_dir import RunDir, make_dir, write_text
from clm_dist.runs import remove_run
from clm_dist.submit.pods import DASHBOARD_PORT, JOB_DIR, Pod, now
from clm_dist.submit.ray_jobs import RayJobs

_GOES_ON = NotReadyError.exit_code
_OWN_FAULT = ConfigError.exit_code
_POLL_S = 2.0
_PAUSE_S = 5.0


class PodDriver:
    """`clm-dist run` in this pod.

    Args:
        command: what is run.
    """

    def __init__(self, pod: Pod, command: Sequence[str]) -> None:
        self._pod = pod
        self._command = command
        self._attempt = f"{pod.name}.{time.time_ns()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False

    @property
    def told(self) -> bool:
        """Whether it was told to end."""
        return self._told

    def run(self) -> int:
        """Run to the end; gives the exit code."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        make_dir(self._pod.state)
        write_text(self._pod.state / "attempt", f"{self._attempt}\n")
        threading.Thread(target=self._give_way, daemon=True).start()
        self._say(f"an attempt begins in the pod {self._pod.name}")
        while (code := self._run_once()) == _GOES_ON and not self._told:
            self._say("it goes on here")
            time.sleep(_PAUSE_S)
        return code

    def _run_once(self) -> int:
        pipe = subprocess.PIPE
        with subprocess.Popen(self._command, stdout=pipe, stderr=subprocess.STDOUT) as process:
            self._process = process
            if self._told:  # while it was being started
                process.terminate()
            assert process.stdout
            for line in process.stdout:
                self._keep(line)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        self._say(f"the driver has ended with {code}")
        return code

    def _say(self, text: str) -> None:
        self._keep(f"{now()} {text}\n".encode())

    def _keep(self, line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        with contextlib.suppress(OSError), (self._pod.state / "log").open("ab") as log:  # a full disk ends no run
            log.write(line)

    def _end(self, number: int, _frame: Any) -> None:
        self._told = True
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def _give_way(self) -> None:
        while True:
            time.sleep(_POLL_S)
            with contextlib.suppress(OSError):  # the claim is away for a moment
                found = (self._pod.state / "attempt").read_text().strip()
                if found not in ("", self._attempt):
                    if self._process:
                        self._process.kill()
                    self._pod.say(f"the attempt {found} has begun, so this one ends")
                    os._exit(1)


def overwrite_once(runs: Path, job_file: Path, marker: Path, number: str) -> None:
    """Remove the run of a job, unless it was removed for this number already."""
    if not marker.exists() or marker.read_text() != number:
        make_dir(marker.parent)
        job = read_saved_job(job_file)
        remove_run(job, RunDir(runs / job.name))
        write_text(marker, number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite-once", metavar="NUMBER")
    parser.add_argument("--ray-job", metavar="ID", help="the job of Ray that this is the entrypoint of")
    options = parser.parse_args(arguments)
    pod, job = Pod.this(), Path(JOB_DIR) / "job.yaml"
    command = [sys.executable, "-m", "clm_dist", "run", str(job), *(["--resume"] if options.resume else [])]
    driver = PodDriver(pod, command)
    try:
        if options.overwrite_once:
            overwrite_once(Path(os.environ["CLM_DIST_RUNS"]), job, pod.state / "overwritten", options.overwrite_once)
        code = driver.run()
    except ClmDistError as error:
        pod.say(f"error: {error}")
        code = error.exit_code
    if code == _GOES_ON and driver.told and options.ray_job:
        # Ended, Ray's job would have failed; as it is, the head that replaces this one gets it again.
        time.sleep(pod.grace_s)
    if code == _OWN_FAULT and options.ray_job:
        # The operator tries again what has failed, and not what was stopped.
        with contextlib.suppress(SubmitError):
            jobs = RayJobs(f"http://127.0.0.1:{DASHBOARD_PORT}", os.environ.get("RAY_AUTH_TOKEN"))
            jobs.stop(options.ray_job)
            time.sleep(pod.grace_s)  # ends with this process
    return code


if __name__ == "__main__":
    sys.exit(main())
