"""The job API of a Ray head: see Ray's "Jobs REST API".

Uses plain HTTP, because importing Ray takes seconds and memory.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from clm_dist.errors import SubmitError, first_line

_TIMEOUT_S = 20
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class RayJobs:
    """The jobs of one head.

    Args:
        url: URL of its dashboard, `http://head:8265`.
        token: Ray's token, if it needs one.
    """

    url: str
    token: str | None = None

    def info(self, job_id: str) -> dict[str, Any] | None:
        """A job's `status`, `message` and more; None if this head does not know it.

        Raises:
            SubmitError: the head does not answer; also below.
        """
        found: dict[str, Any] | None = self._ask("GET", f"/api/jobs/{job_id}")
        return found

    def submit(self, job_id: str, entrypoint: str) -> None:
        """Start a job."""
        self._ask("POST", "/api/jobs/", {"entrypoint": entrypoint, "submission_id": job_id})

    def stop(self, job_id: str) -> None:
        """End a job: SIGTERM to its processes, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        self._ask("POST", f"/api/jobs/{job_id}/stop", {})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        # A proxy cannot reach pods.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()
            if error.code == 404 and method == "GET":
                return None
            raise SubmitError(f"{self.url}{path}: {error.code} {said[-300:]}") from None
        except (OSError, ValueError) as error:
            raise SubmitError(f"{self.url}{path}: {first_line(error)}") from None
