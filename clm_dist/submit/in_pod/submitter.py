"""The submitter pod of a RayJob: `python -m clm_dist.submit.in_pod.submitter DRIVER...`.

It submits the driver to Ray, polls its state until it has ended, and prints its log from the claim, over all attempts.
The operator's own submitter reads the log from Ray instead, and treats the end of that stream as the end of the job,
although a busy head also ends it (ray-project/kuberay#4921). A new head without the job gets the job again.

Exits with 0 when the job has ended, with success or not; the operator asks Ray which. Exits with 1 after 280 s without
a head, because the operator gives the RayJob up after 300 s; then the operator starts this pod again.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from clm_dist.errors import SubmitError
from clm_dist.submit.in_pod.pod import Pod, now
from clm_dist.submit.in_pod.ray_jobs import ENDED, RayJobs
from clm_dist.submit.logs import LogFile

_PATIENCE_S = 280
_POLL_S = 2.0


def follow(jobs: RayJobs, job_id: str, driver: Sequence[str], log: LogFile, *, patience_s: float = _PATIENCE_S) -> int:
    """Submit a driver, wait for its end, and return the exit code."""
    answered = time.monotonic()
    while True:
        try:
            info = jobs.info(job_id)
            if info is None:
                # With its number, the driver can stop its own job.
                jobs.submit(job_id, shlex.join([*driver, f"--ray-job={job_id}"]))
                _say(f"submitted the driver to Ray as {job_id}")
            answered = time.monotonic()
        except SubmitError as error:
            info = None
            if time.monotonic() - answered > patience_s:
                _say(f"no head of Ray for {patience_s:.0f} s: {error}")
                return 1
        for _, line in log.new_lines():
            print(line, flush=True)
        if info is not None and info["status"] in ENDED:
            _say(f"Ray's job {job_id} has ended: {info['status']}; {info.get('message') or ''}")
            return 0
        time.sleep(_POLL_S)


def _say(text: str) -> None:
    print(f"{now()} {text}", flush=True)


def main() -> int:
    # The first process of a pod ignores SIGTERM by default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    address = os.environ["RAY_DASHBOARD_ADDRESS"]
    jobs = RayJobs(address if "://" in address else f"http://{address}", os.environ.get("RAY_AUTH_TOKEN"))
    return follow(jobs, os.environ["RAY_JOB_SUBMISSION_ID"], sys.argv[1:], LogFile(Pod.this().log))


if __name__ == "__main__":
    sys.exit(main())
